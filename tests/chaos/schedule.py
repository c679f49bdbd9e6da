"""What is done to a server, and when: drawn from a seed, so that a failure can be had again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PROCESSES = {
    "worker": ("kill", "stop", "slow", "refuse"),
    "standby": ("kill", "stop", "slow"),
    "api": ("kill", "stop", "slow", "refuse"),
}
STORES = {
    "database": ("kill", "stop", "pause", "slow", "refuse", "swallow"),
    "redis": ("kill", "stop", "pause", "slow", "refuse", "swallow"),
}
EVERYTHING = tuple((target, deed) for target, deeds in (PROCESSES | STORES).items() for deed in deeds)


@dataclass(frozen=True, slots=True)
class Fault:
    """`at`, `lasts`: seconds, the former since the load began. `which`: of the API processes. `strength`: 0 to 1, where it has one."""

    at: float
    target: str
    deed: str
    lasts: float
    which: int
    strength: float

    def __str__(self) -> str:
        what = f"{self.at:6.2f} s  {self.deed:<8}{self.target}"
        which = f" {self.which}" if self.target == "api" else ""
        return f"{what}{which}" + (f" for {self.lasts:.2f} s" if self.lasts else "")


def schedule(
    seed: int, seconds: float, deeds: Sequence[tuple[str, str]] = EVERYTHING, *, pause: tuple[float, float] = (0.4, 1.6)
) -> list[Fault]:
    """Everything once, in a drawn order, then everything again in another, until the time is over."""
    return list(_drawn(random.Random(f"faults {seed}"), seconds, deeds, pause))


def _drawn(draw: random.Random, seconds: float, deeds: Sequence[tuple[str, str]], pause: tuple[float, float]) -> Iterator[Fault]:
    at = 1.0
    while True:
        for target, deed in draw.sample(deeds, len(deeds)):
            # What is killed is gone at once; stores come back after a while.
            instant = (deed == "kill" and target in PROCESSES) or (target, deed) in (("worker", "stop"), ("standby", "stop"))
            yield Fault(
                at=at,
                target=target,
                deed=deed,
                lasts=0.0 if instant else draw.uniform(0.3, 3.0),
                which=draw.randrange(2),
                strength=draw.random(),
            )
            at += draw.uniform(*pause)
            if at >= seconds:
                return
