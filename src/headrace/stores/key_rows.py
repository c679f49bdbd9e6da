"""Keys, tenants and audit entries as rows."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import sqlalchemy as sa

from headrace.records import AuditEntry, KeyRecord, LimitSpec, Scope, TenantRecord
from headrace.types import PRIORITIES

_METADATA = sa.MetaData()
_LIMITS = ("rpm", "tpm", "concurrency", "budget_tokens", "budget_period")


def _limit_columns() -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.String if name == "budget_period" else sa.BigInteger) for name in _LIMITS]


TENANTS = sa.Table(
    "tenants",
    _METADATA,
    sa.Column("name", sa.String, primary_key=True),
    *_limit_columns(),
    sa.Column("created_at", sa.Double),
    sa.Column("changed", sa.BigInteger),
)
KEYS = sa.Table(
    "keys",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String),
    sa.Column("prefix", sa.String),
    sa.Column("digest", sa.LargeBinary),
    sa.Column("tenant", sa.String),
    sa.Column("models", sa.Text),
    sa.Column("scopes", sa.Text),
    *_limit_columns(),
    sa.Column("created_at", sa.Double),
    sa.Column("created_by", sa.String),
    sa.Column("expires_at", sa.Double),
    sa.Column("revoked_at", sa.Double),
    sa.Column("all_tenants", sa.Boolean),
    sa.Column("priority", sa.String),
    sa.Column("changed", sa.BigInteger),
)
RETIRED = sa.Table(
    "retired_secrets",
    _METADATA,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("key_id", sa.String),
    sa.Column("ends_at", sa.Double),
)
CHANGES = sa.Table(
    "key_changes",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("version", sa.BigInteger),
    sa.Column("pepper_check", sa.LargeBinary),
)
AUDIT = sa.Table(
    "audit",
    _METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("at", sa.Double),
    sa.Column("actor", sa.String),
    sa.Column("action", sa.String),
    sa.Column("subject", sa.String),
    sa.Column("tenant", sa.String),
    sa.Column("details", sa.Text),
)

_KNOWN_SCOPES = frozenset(get_args(Scope))


def key_row(record: KeyRecord, changed: int) -> dict[str, Any]:
    row = msgspec.structs.asdict(record)
    limits = row.pop("limits")
    row["models"] = msgspec.json.encode(record.models).decode()
    row["scopes"] = " ".join(sorted(record.scopes))
    return {**row, **msgspec.structs.asdict(limits), "changed": changed}


def key_of(row: Any) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        name=row.name,
        prefix=row.prefix,
        digest=bytes(row.digest),
        tenant=row.tenant,
        models=tuple(msgspec.json.decode(row.models, type=list[str])),
        scopes=frozenset(scope for scope in row.scopes.split() if scope in _KNOWN_SCOPES),
        limits=limits_of(row),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        all_tenants=bool(row.all_tenants),
        priority=row.priority if row.priority in PRIORITIES else "default",
    )


def tenant_row(record: TenantRecord, changed: int) -> dict[str, Any]:
    return {"name": record.name, "created_at": record.created_at, "changed": changed, **msgspec.structs.asdict(record.limits)}


def tenant_of(row: Any) -> TenantRecord:
    return TenantRecord(name=row.name, limits=limits_of(row), created_at=row.created_at)


def limits_of(row: Any) -> LimitSpec:
    return LimitSpec(**{name: getattr(row, name) for name in _LIMITS})


def audit_row(entry: AuditEntry) -> dict[str, Any]:
    row = msgspec.structs.asdict(entry)
    del row["id"]
    row["details"] = msgspec.json.encode(entry.details).decode()
    return row


def entry_of(row: Any) -> AuditEntry:
    return AuditEntry(
        id=row.id,
        at=row.at,
        actor=row.actor,
        action=row.action,
        subject=row.subject,
        tenant=row.tenant,
        details=msgspec.json.decode(row.details, type=dict[str, Any]),
    )
