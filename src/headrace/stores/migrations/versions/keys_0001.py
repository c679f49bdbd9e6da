"""Keys, tenants, and the audit log, which database triggers keep append-only."""

import sqlalchemy as sa
from alembic import op

revision = "keys_0001"
down_revision = None
branch_labels = ("keys",)
depends_on = None

_LIMITS = ("rpm", "tpm", "concurrency", "budget_tokens")


def _limits() -> list[sa.Column[int] | sa.Column[str]]:
    return [*(sa.Column(name, sa.BigInteger) for name in _LIMITS), sa.Column("budget_period", sa.String(8), nullable=False)]


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(128), primary_key=True),
        *_limits(),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("prefix", sa.String(16), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False, unique=True),
        sa.Column("tenant", sa.String(128), sa.ForeignKey("tenants.name"), nullable=False, index=True),
        sa.Column("models", sa.Text, nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        *_limits(),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("created_by", sa.String(160), nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.Column("all_tenants", sa.Boolean, nullable=False),
        sa.Column("changed", sa.BigInteger, nullable=False, index=True),
    )
    # A secret that a rotation replaced, for its grace period; `keys.digest` is the newest.
    op.create_table(
        "retired_secrets",
        sa.Column("digest", sa.LargeBinary(32), primary_key=True),
        sa.Column("key_id", sa.String(40), sa.ForeignKey("keys.id"), nullable=False, index=True),
        sa.Column("ends_at", sa.Double, nullable=False),
    )
    # One row. `version` is raised by every change to keys and tenants, whose `changed` is the version that changed them last: API processes
    # watch it. `pepper_check` tells whether the digests were made with the pepper at hand.
    changes = op.create_table(
        "key_changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("pepper_check", sa.LargeBinary(32)),
    )
    op.bulk_insert(changes, [{"id": 1, "version": 1}])
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("at", sa.Double, nullable=False, index=True),
        sa.Column("actor", sa.String(160), nullable=False),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("subject", sa.String(160), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    _forbid_changes("audit")


def _forbid_changes(table: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, 'the {table} log is append-only'); END"
            )
        # INSERT OR REPLACE would delete without a word.
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN EXISTS (SELECT 1 FROM {table} WHERE id = NEW.id) "  # noqa: S608
            f"BEGIN SELECT RAISE(ABORT, 'the {table} log is append-only'); END"
        )
        return
    op.execute(
        f"CREATE FUNCTION {table}_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION 'the {table} log is append-only'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_is_append_only()"
    )
