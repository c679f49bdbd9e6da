"""What filters decided, for whoever counts it and for the caller."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from headrace.call import Call
from headrace.policies.filters.stream import Action

NOTE = "X-Headrace-Filter"
"""The header of non-streaming answers, and the name in the comment at the end of streams."""

Stage = Literal["input", "output"]


class Decisions:
    """One call's decisions at one stage: kept in `call.filtered`, which metrics count, and noted on the call if callers are to be told."""

    def __init__(self, call: Call, stage: Stage, *, report: bool) -> None:
        self._call = call
        self._stage: Stage = stage
        self._report = report
        self._noted: Counter[str] | None = None
        """Made with the first decision: most calls have none."""

    def __call__(self, kind: str, action: Action) -> None:
        self._call.filtered.append((self._stage, kind, action))
        if self._report:
            if self._noted is None:
                self._noted = self._noted_before()
            self._noted[kind] += 1
            self._call.notes[NOTE] = ",".join(f"{kind}={number}" for kind, number in self._noted.items())

    def _noted_before(self) -> Counter[str]:
        before = self._call.notes.get(NOTE)
        if before is None:
            return Counter()
        return Counter({kind: int(number) for kind, _, number in (item.partition("=") for item in before.split(","))})
