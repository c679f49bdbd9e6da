"""The error book: a row for each fingerprint."""

import sqlalchemy as sa
from alembic import op

revision = "errors_0001"
down_revision = None
branch_labels = ("errors",)
depends_on = None


def upgrade() -> None:
    op.create_table(
        "errors",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("process", sa.String(160), nullable=False),
        sa.Column("code", sa.String(160), nullable=False),
        sa.Column("kind", sa.String(200), nullable=False),
        sa.Column("route", sa.String(200), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("frames", sa.Text, nullable=False),
        sa.Column("detail", sa.String(200), nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.Column("first_seen", sa.Double, nullable=False),
        sa.Column("last_seen", sa.Double, nullable=False, index=True),
        sa.Column("request_id", sa.String(160), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
    )
