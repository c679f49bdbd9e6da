"""What is asked of the limits, and what they answer. The rules are in docs/limits.md.

These structs cross the socket to the supervisor as MessagePack and go to Redis as JSON; both spell them as arrays that begin with
a tag. Counts are tokens, times are seconds.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec

from headrace.records import BudgetPeriod, LimitSpec

Dimension = Literal["requests", "tokens", "concurrency", "budget"]
"""What ran out: the requests' bucket, the tokens' bucket, the requests at a time, or the budget of tokens."""

LEASE_SECONDS = 45.0
"""A lease that its process hasn't renewed for so long has lapsed: the process is gone."""
LAPSED_SECONDS = 3600.0
"""So long a lapsed lease can still be settled, by who finds out what was really used."""


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """Whom a request counts for, and the limits over all that subject's requests; None is no limit."""

    subject: str
    """`key:ID`, `tenant:NAME` or `address:NETWORK`."""
    requests: int | None = None
    """A token bucket's size; it fills once in `window` seconds."""
    tokens: int | None = None
    """Likewise."""
    concurrency: int | None = None
    budget: int | None = None
    period: BudgetPeriod = "month"
    """Calendar days and months are UTC's."""
    window: float = 60.0

    @property
    def limited(self) -> bool:
        return not (self.requests is None and self.tokens is None and self.concurrency is None and self.budget is None)


def claim_of(subject: str, limits: LimitSpec) -> Claim:
    """A key's or a tenant's claim."""
    return Claim(subject, limits.rpm, limits.tpm, limits.concurrency, limits.budget_tokens, limits.budget_period)


class Room(msgspec.Struct, frozen=True, array_like=True):
    """How a subject stands: what is in its buckets, and what it has spent and holds of its budget. 0 where there is no such limit."""

    requests: float = 0.0
    """Below 0 after use that nothing could refuse any more."""
    tokens: float = 0.0
    spent: int = 0
    """Settled, in this period."""
    held: int = 0
    """Leased by running requests."""
    running: int = 0


class Take(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Admit a request for all claims, or for none. It needs `prompt` and `least` tokens, and gets up to `output` of output."""

    id: str
    """The request's; it names the lease from here on."""
    claims: tuple[Claim, ...]
    prompt: int
    output: int
    least: int
    requests: int = 1
    """0: a further lease of a request that was admitted elsewhere; only tokens are taken."""
    seeds: tuple[int | None, ...] = ()
    """For each claim what the ledger says was spent in this period; used where the budget isn't known."""
    owner: str = ""
    """The name under which the asking process writes its bills (`Gone`)."""


class Extend(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Lease more output. Rates let a running request go on, below nothing; budgets don't. A lease that was forgotten (`life`) goes on."""

    id: str
    tokens: int
    life: str = ""


RECOVERED = "recovered"
"""For `Settle.life`: of a process that died, so that it isn't known whether the place ever had the lease. Its use is final: where the
place had heard of another one, the difference is charged."""
RECENT = "recent"
"""Likewise, of a request that was over a little before that: the process has most likely settled it."""


class Settle(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The request is over and used so many tokens. Unknown ids are ignored, so that it can be said twice; but where the place has
    forgotten the lease (`life`), the budgets of `claims` are charged."""

    id: str
    used: int
    claims: tuple[Claim, ...] = ()
    life: str = ""
    """Of the place, when it was asked for the lease; it begins another life when it has lost what it knew. "": not known."""
    ended: float = 0.0
    """When the request was over, Unix time."""
    guessed: bool = False
    """It is the most that it can have been; a `Charge` under the id and `CORRECTED` follows where it was another number."""


CORRECTED = ":corrected"


class Charge(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """What was used without a lease here. `id` makes it count once; if a lease has that id, it is settled with it instead, and where no
    request is charged the one that was counted with the lease is given back."""

    id: str
    claims: tuple[Claim, ...]
    requests: int
    used: int
    ended: float = 0.0
    """When the request was over, Unix time: a budget that was read from the ledger later has it already. 0: not known."""


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """These requests are still running."""

    ids: tuple[str, ...]


class Gone(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """That process is dead, and what all of its bills say was told: a request whose lease is still there had no bill yet, so no engine was
    asked for it. Its leases are settled with nothing, and what it may have asked before its death and comes only now takes none."""

    owner: str


Ask = Take | Extend | Settle | Charge | Renew | Gone


class Taken(msgspec.Struct, frozen=True, array_like=True, tag=1):
    granted: int
    """Tokens of output that the request may use."""
    ceiling: int | None
    """Most tokens of output that its budgets could give it, the granted ones included; None without a budget."""
    rooms: tuple[Room, ...]
    """One for each claim."""
    life: str = ""
    """Of the place, as in `Settle`."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=2):
    which: int
    """The claim that refuses."""
    dimension: Dimension
    wait: float | None
    """Seconds until it could be admitted; None where that can't be known here."""
    passing: bool
    """What is missing is in the hands of running requests, which may give it back unused."""
    rooms: tuple[Room, ...]


class Unseeded(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Nothing was done: it isn't known what these claims have spent since then (Unix time). Take again with `seeds`."""

    since: tuple[float | None, ...]
    """For each claim; None where it is known or doesn't matter."""


class Extended(msgspec.Struct, frozen=True, array_like=True, tag=4):
    granted: int
    """Further tokens; fewer than asked where a budget ends."""
    passing: bool = False
    """As in `Refused`: asking again later may give more."""


class Settled(msgspec.Struct, frozen=True, array_like=True, tag=5):
    rooms: tuple[Room, ...] | None = None
    """One for each claim; None for an unknown id."""


Reply = Taken | Refused | Unseeded | Extended | Settled


def period_start(period: BudgetPeriod, now: float) -> float:
    """Unix time at which the budget's period that holds `now` began, in UTC; 0 for `total`."""
    if period == "total":
        return 0.0
    if period == "day":
        return now // 86400 * 86400
    moment = datetime.fromtimestamp(now, UTC)
    return datetime(moment.year, moment.month, 1, tzinfo=UTC).timestamp()


def period_end(period: BudgetPeriod, now: float) -> float | None:
    """Unix time at which the next period begins; None for `total`."""
    if period == "total":
        return None
    start = period_start(period, now)
    if period == "day":
        return start + 86400
    return period_start("month", (datetime.fromtimestamp(start, UTC) + timedelta(days=32)).timestamp())


_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}


def parse_rate(text: str) -> tuple[int, float]:
    """`10/minute` as requests and seconds. Raises `ValueError` with what would be right."""
    matched = re.fullmatch(r"\s*([0-9]{1,9})\s*/\s*(second|minute|hour|day)s?\s*", text)
    if matched is None or int(matched[1]) < 1:
        raise ValueError(f"{text!r} is not a rate such as 10/minute (second, minute, hour or day)")
    return int(matched[1]), _SECONDS[matched[2]]
