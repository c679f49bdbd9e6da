"""New versions of a model take over from old ones, without a request lost; and go back by themselves where they do worse.

A promoted version is loaded beside the old one, or refused. Then it answers the golden prompts, traffic moves, and it is watched: if more
of its requests fail than the old one's did, its first tokens take longer, or its worker dies, the name stands for the old version again.
The version that loses finishes what it has, and is unloaded. What a name stands for outlives the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog

from headrace.config import FleetSection
from headrace.control import AskModels, ShadowCompared, ToChild, VersionPromoted
from headrace.engine_yard import EngineYard, Residence
from headrace.errors import HeadraceError, ModelNotFound, ModelRefused
from headrace.golden import answers, drift
from headrace.policies.alert_rules import RequestCounts

SLOWER_BY = 0.05
"""Seconds by which first tokens must take longer at least to be called slower."""
LOOKS = 0.2
"""Seconds between looks at a version that is watched."""

UpgradeState = Literal["loading", "asking golden prompts", "watched", "promoted", "rolled back", "refused"]


@dataclass(slots=True)
class Upgrade:
    """What became of a promotion, or is becoming of it."""

    old: str
    new: str
    state: UpgradeState = "loading"
    reason: str = ""
    likeness: float | None = None
    """Of the answers to the golden prompts, 0 to 1."""
    began_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    recalled: str = ""
    """Why an administrator wants the old version back, if so."""
    over: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Shadowed:
    """Answers of a model that gets copies, compared to those that were given."""

    compared: int = 0
    alike: float = 0.0
    """Likeness, added up."""
    failed: int = 0


class Upgrades:
    """`current`: by family, the version that its name stands for; it is changed here, told to API processes with `tell`, and kept in
    `file`, as is the version `before`. `section` gives the configuration in force."""

    def __init__(
        self,
        yard: EngineYard,
        current: dict[str, str],
        before: dict[str, str],
        section: Callable[[], FleetSection],
        tell: Callable[[ToChild], None],
        file: Path,
    ) -> None:
        self.current = current
        self._yard = yard
        self._section = section
        self._tell = tell
        self._file = file
        self._before = before
        """By family, the version that was current before."""
        self._upgrades: dict[str, Upgrade] = {}
        """By family, the last one."""
        self._under_way: set[str] = set()
        self._counts: dict[str, RequestCounts] = {}
        """By public name, over all time."""
        self._shadows: dict[tuple[str, str], Shadowed] = {}
        self._log = structlog.get_logger("headrace.upgrades")

    async def answer(self, asked: AskModels) -> dict[str, Any]:
        """Do what an administrator asks. Raises `ModelRefused` and `ModelNotFound`."""
        if asked.action == "list":
            return self.listing()
        if asked.action == "rollback":
            return await self.rollback(self._family(asked.model))
        if asked.action == "promote":
            return await self.promote(self._to_promote(asked.model), asked.watch)
        residence = self._residence(asked.model)
        if asked.action == "load":
            await self._yard.have(residence.name)
            self._yard.let_go(residence.name)
        elif asked.action == "unload":
            await self._yard.unload(residence.name)
        return self._line(residence)

    # What there is

    def listing(self) -> dict[str, Any]:
        """All models with their state, and the memory that they take; sizes are bytes."""
        held = self._yard.stables.held()
        return {
            "models": [self._line(residence) for residence in self._yard.residences.values()],
            "memory": {pool: {"budget": size, "held": held.get(pool, 0)} for pool, size in self._yard.stables.budget.items()},
            "upgrades": {family: self._told(upgrade) for family, upgrade in self._upgrades.items()},
            "shadows": [
                {
                    "model": model,
                    "shadow": shadow,
                    "compared": each.compared,
                    "likeness": round(each.alike / each.compared, 4) if each.compared else None,
                    "failed": each.failed,
                }
                for (model, shadow), each in self._shadows.items()
            ],
        }

    def _line(self, residence: Residence) -> dict[str, Any]:
        stall, member = self._yard.stables[residence.name], residence.member
        resident = [line["memory_mib"] for place in residence.places for line in place.listings("") if line.get("memory_mib")]
        idle = time.monotonic() - stall.last_used
        return {
            "name": residence.name,
            "family": member.family or residence.name,
            "version": member.version,
            "aliases": [
                name for each in self._yard.residences.values() for name in each.files.aliases if self._residence(name) is residence
            ],
            "current": self.current.get(member.family) == residence.name or not member.family,
            "state": stall.state,
            "reason": residence.failure or residence.waits,
            "pinned": stall.pinned,
            "keep_alive": stall.keep_alive,
            "replicas": len(residence.paths),
            "in_use": bool(stall.users) or bool(stall.kept),
            "needs": stall.needs,
            "resident_mib": round(sum(resident), 1),
            "idle_seconds": round(idle, 1) if stall.last_used else None,
        }

    def hear(self, message: list[RequestCounts] | ShadowCompared) -> None:
        """What API processes report of requests that are over."""
        if isinstance(message, ShadowCompared):
            shadowed = self._shadows.setdefault((message.model, message.shadow), Shadowed())
            if message.likeness < 0:
                shadowed.failed += 1
            else:
                shadowed.compared += 1
                shadowed.alike += message.likeness
            return
        for counts in message:
            total = self._counts.setdefault(counts.model, RequestCounts(counts.model))
            for name in ("requests", "failed", "begun", "first_seconds"):
                setattr(total, name, getattr(total, name) + getattr(counts, name))

    def add(self, family: str, version: str) -> None:
        """A further version; of a new family it is the current one."""
        if family:
            self.current.setdefault(family, version)

    # Words

    def _residence(self, name: str) -> Residence:
        residences = self._yard.residences
        found = residences.get(name) or residences.get(self.current.get(name, ""))
        found = found or next((each for each in residences.values() if name in each.files.aliases), None)
        if found is not None and name in found.files.aliases and found.member.family in found.files.aliases:
            # A further name of the family, not of one version.
            return residences.get(self.current.get(found.member.family, ""), found)
        alias = self._section().aliases.get(name)
        if found is None and alias is not None:
            if alias.to is None:
                raise ModelRefused(f"{name} stands for several models: name one of {', '.join(alias.split)}.")
            return self._residence(alias.to)
        if found is None:
            raise ModelNotFound(f"There is no model {name[:100]!r} here; there is {', '.join(self._yard.residences)}.", param="model")
        return found

    def _family(self, name: str) -> str:
        return self._residence(name).member.family

    def _to_promote(self, name: str) -> Residence:
        residence = self._residence(name)
        family = residence.member.family
        if name not in self._yard.residences:
            others = [each for each in self._yard.residences.values() if each.member.family == family and each.name != self.current[family]]
            if len(others) != 1:
                raise ModelRefused(
                    f"Say which version of {family} to promote: {', '.join(each.name for each in others) or 'there is no other'}."
                )
            return others[0]
        return residence

    # Upgrades

    async def promote(self, residence: Residence, watch: float | None = None) -> dict[str, Any]:
        """Returns once the version is watched no more. Raises `ModelRefused`, with the reason, where the old one is current after all."""
        family, new = residence.member.family, residence.name
        if not family:
            raise ModelRefused(f"{new} has no versions: it is not in [models].")
        old = self.current[family]
        if family in self._under_way:
            raise ModelRefused(f"{family} is being upgraded already.")
        if old == new:
            raise ModelRefused(f"{family} is {new} already.")
        upgrade = self._begin(family, old, new)
        try:
            await self._try(upgrade, family, residence, self._section().upgrade_watch if watch is None else watch)
        except HeadraceError as error:
            upgrade.state, upgrade.reason = "refused", error.message
        finally:
            self._end(family, upgrade)
        if upgrade.state == "promoted":
            self._log.info("version promoted", model=family, version=new, before=old)
            return self._told(upgrade)
        self._log.error("version not promoted", model=family, version=new, kept=old, state=upgrade.state, reason=upgrade.reason)
        raise ModelRefused(f"{new} is not promoted ({upgrade.state}), {family} is {old}: {upgrade.reason}")

    async def rollback(self, family: str) -> dict[str, Any]:
        """Back to the version that was current before."""
        upgrade = self._upgrades.get(family)
        if family in self._under_way and upgrade is not None:
            upgrade.recalled = "It was rolled back by an administrator."
            await upgrade.over.wait()
            return self._told(upgrade)
        before = self._before.get(family)
        if before is None or before not in self._yard.residences:
            raise ModelRefused(f"{family} has no version to go back to; promote one: `headrace models promote {family}@VERSION`.")
        now = self.current[family]
        upgrade = self._begin(family, now, before)
        try:
            await self._yard.have(before)
            try:
                self._switch(family, before)
                upgrade.state = "promoted"
                upgrade.reason = "It was rolled back to by an administrator."
                self._retire(now)
            finally:
                self._yard.let_go(before)
        finally:
            self._end(family, upgrade)
        self._log.info("version rolled back", model=family, version=before, before=now)
        return self._told(upgrade)

    def _begin(self, family: str, old: str, new: str) -> Upgrade:
        if family in self._under_way:
            raise ModelRefused(f"{family} is being upgraded already.")
        self._under_way.add(family)
        upgrade = self._upgrades[family] = Upgrade(old, new)
        return upgrade

    def _end(self, family: str, upgrade: Upgrade) -> None:
        self._under_way.discard(family)
        upgrade.ended_at = time.time()
        upgrade.over.set()

    async def _try(self, upgrade: Upgrade, family: str, residence: Residence, watch: float) -> None:
        yard, old = self._yard, self._yard.residences[upgrade.old]
        both = [upgrade.new] if yard.stables[old.name].state != "ready" else [upgrade.old, upgrade.new]
        kept: list[str] = []
        try:
            for name in both:
                await yard.have(name)
                kept.append(name)
            upgrade.state = "asking golden prompts"
            reason = await self._drifts(upgrade, residence, old if len(both) == 2 else None)
            if reason:
                upgrade.state, upgrade.reason = "rolled back", reason
                self._retire(upgrade.new)
                return
            before, earlier = self._snapshot(residence), self._before.get(family)
            self._switch(family, upgrade.new)
            upgrade.state = "watched"
            reason = await self._worse(upgrade, residence, old, before, watch)
            if reason:
                self._switch(family, upgrade.old, before=earlier)
                upgrade.state, upgrade.reason = "rolled back", reason
                self._retire(upgrade.new)
            else:
                upgrade.state = "promoted"
                self._retire(upgrade.old)
        finally:
            for name in kept:
                yard.let_go(name)

    async def _drifts(self, upgrade: Upgrade, residence: Residence, old: Residence | None) -> str:
        """Why its answers to the golden prompts aren't good enough, if so."""
        entry = residence.member.entry
        assert entry is not None
        prompts: Sequence[Any] = entry.golden
        if not prompts:
            return ""
        new_answers = await answers(residence.files, residence.paths[0], prompts)
        old_answers = None if old is None else await answers(old.files, old.paths[0], prompts)
        upgrade.likeness, example = drift(prompts, new_answers, old_answers)
        if upgrade.likeness >= entry.golden_similarity:
            return ""
        return (
            f"Its answers to the golden prompts have a likeness of {upgrade.likeness:.2f}, "
            f"less than golden_similarity, {entry.golden_similarity:g}: {example}."
        )

    def _snapshot(self, residence: Residence) -> tuple[RequestCounts, int]:
        counts = self._counts.get(residence.files.public_name)
        total = RequestCounts(residence.files.public_name)
        if counts is not None:
            for name in ("requests", "failed", "begun", "first_seconds"):
                setattr(total, name, getattr(counts, name))
        return total, sum(place.restarts for place in residence.places)

    async def _worse(self, upgrade: Upgrade, new: Residence, old: Residence, before: tuple[RequestCounts, int], watch: float) -> str:
        """Why it does worse than the old version, as soon as that is known; empty if it didn't while it was watched."""
        end = time.monotonic() + watch
        base, _ = self._snapshot(old)
        while True:
            if upgrade.recalled:
                return upgrade.recalled
            now, deaths = self._snapshot(new)
            if deaths > before[1]:
                return f"Its worker died. {new.places[0].reason if new.places else ''}".strip()
            if reason := self._compared(base, before[0], now):
                return reason
            left = end - time.monotonic()
            if left <= 0:
                return ""
            await asyncio.sleep(min(LOOKS, left))

    def _compared(self, base: RequestCounts, before: RequestCounts, now: RequestCounts) -> str:
        section = self._section()
        requests, failed = now.requests - before.requests, now.failed - before.failed
        if requests >= section.upgrade_min_requests:
            share, usual = failed / requests, base.failed / base.requests if base.requests else 0.0
            if share > usual + section.upgrade_error_share:
                return f"{failed} of its {requests} requests failed; before it was {usual:.1%}."
        begun, seconds = now.begun - before.begun, now.first_seconds - before.first_seconds
        if min(begun, base.begun) >= section.upgrade_min_requests:
            mean, usual = seconds / begun, base.first_seconds / base.begun
            if mean > section.upgrade_slowdown * usual and mean > usual + SLOWER_BY:
                return f"Its first tokens take {mean * 1000:.0f} ms on the mean; before it was {usual * 1000:.0f} ms."
        return ""

    def _switch(self, family: str, name: str, *, before: str | None = "") -> None:
        """`before`: what to go back to from then on, if it isn't what the name stood for until now; None is nothing."""
        back = self.current[family] if before == "" else before
        self._before.pop(family, None)
        if back is not None:
            self._before[family] = back
        self.current[family] = name
        self._tell(VersionPromoted(family, name))
        temporary = self._file.with_suffix(".new")
        try:
            temporary.write_text(json.dumps({"current": self.current, "before": self._before}, indent=1))
            temporary.replace(self._file)
        except OSError as error:
            self._log.warning("promotion not kept", file=str(self._file), reason=str(error))

    def _retire(self, name: str) -> None:
        """Unload it when what runs is over, unless it is addressed by something else, too."""
        stall = self._yard.stables[name]
        elsewhere = any(name in (alias.to, alias.shadow, *alias.split) for alias in self._section().aliases.values())
        if not stall.pinned and not elsewhere:
            self._yard.stables.replace(name)
            self._yard.stir()

    @staticmethod
    def _told(upgrade: Upgrade) -> dict[str, Any]:
        return {
            "state": upgrade.state,
            "old": upgrade.old,
            "new": upgrade.new,
            "reason": upgrade.reason,
            "likeness": None if upgrade.likeness is None else round(upgrade.likeness, 4),
            "began_at": upgrade.began_at,
            "ended_at": upgrade.ended_at,
        }


def remembered(file: Path, current: dict[str, str], names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What each family's name stands for, and what it stood for before: as it was when the last server ended, as far as these versions
    still exist."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return current, {}
    kept = kept if isinstance(kept, dict) else {}
    # Before 0.2 it held the current versions alone.
    now, before = (kept.get("current"), kept.get("before")) if isinstance(kept.get("current"), dict) else (kept, {})
    now, before = (each if isinstance(each, dict) else {} for each in (now, before))
    stands = {family: now[family] if now.get(family) in names else name for family, name in current.items()}
    return stands, {family: before[family] for family, name in stands.items() if before.get(family) in names and before[family] != name}
