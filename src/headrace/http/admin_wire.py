"""Bodies of the routes under /admin."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from headrace.records import Scope
from headrace.types import Priority

Count = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
Period = Literal["day", "month", "total"]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds_of(text: str) -> float:
    """`90s`, `15m`, `12h`, `30d`, `2w` in seconds. Raises `ValueError`."""
    found = re.fullmatch(r"([0-9]{1,6})([smhdw])", text.strip())
    if found is None:
        raise ValueError(f"{text[:40]!r} is not a duration such as 30d or 12h")
    return float(int(found[1]) * _UNITS[found[2]])


def moment_of(value: str | float, now: float) -> float:
    """Unix time: a duration from now, an ISO date or time (UTC unless it says otherwise), or Unix seconds. Raises `ValueError`."""
    if not isinstance(value, str):
        if not math.isfinite(value) or not 0 <= value < 2**40:
            raise ValueError("this is not a time in Unix seconds")
        return float(value)
    try:
        return now + seconds_of(value)
    except ValueError:
        pass
    try:
        parsed = datetime.fromisoformat(value.strip())
    except ValueError:
        raise ValueError(f"{value[:40]!r} is neither a duration such as 30d nor a date such as 2030-01-31") from None
    return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp()


def _a_moment(value: str | float) -> str | float:
    moment_of(value, 0.0)
    return value


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class NewKey(_Body):
    """What a new key may do; what is left out is inherited from the key that makes it."""

    name: str = Field(min_length=1, max_length=128)
    tenant: str | None = Field(None, min_length=1, max_length=128)
    models: list[str] | None = Field(None, max_length=256)
    scopes: list[Scope] | None = Field(None, min_length=1, max_length=8)
    rpm: Count | None = None
    tpm: Count | None = None
    concurrency: Count | None = None
    budget_tokens: Count | None = None
    budget_period: Period | None = Field(None, alias="period")
    priority: Priority | None = Field(None, description="The highest that its requests may have; default is `default`")
    expires: Annotated[str | float, AfterValidator(_a_moment)] | None = Field(None, description="30d, an ISO date, or Unix seconds")


class Rotation(_Body):
    grace: float = Field(0.0, ge=0, le=365 * 86400, description="Seconds that the old secret goes on working")


class TenantLimits(_Body):
    """Limits over all keys of a tenant; those left out stay, null takes one away."""

    rpm: Count | None = None
    tpm: Count | None = None
    concurrency: Count | None = None
    budget_tokens: Count | None = None
    budget_period: Period | None = Field(None, alias="period")


class NewTenant(TenantLimits):
    name: str = Field(min_length=1, max_length=128, pattern=r"\S")
