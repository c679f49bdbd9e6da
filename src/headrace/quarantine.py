"""Requests that an engine dies of, known by a fingerprint, and refused for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import blake2b

import msgspec

from headrace.errors import RequestQuarantined
from headrace.types import GenerateRequest


def fingerprint(request: GenerateRequest) -> bytes:
    """The same for requests that an engine can't tell apart: prompt and sampling."""
    asked = msgspec.msgpack.encode((request.prompt, request.sampling, request.messages, request.text))
    return blake2b(asked, digest_size=16).digest()


class Quarantine:
    """One model's, in one process. Times are Unix times, so that processes can tell each other."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}
        self.convictions = 0
        """Fingerprints that were added, by whichever process."""

    def add(self, print_: bytes, until: float) -> bool:
        """False if it was known."""
        known = self._until.get(print_, 0.0) >= until
        if not known:
            self.convictions += print_ not in self._until
            self._until[print_] = until
        return not known

    def refusal(self, request: GenerateRequest) -> RequestQuarantined | None:
        """Why not to try this request, if so."""
        if not self._until:
            return None
        print_ = fingerprint(request)
        until = self._until.get(print_)
        if until is None:
            return None
        left = until - self._clock()
        if left > 0:
            return convicted(left)
        del self._until[print_]
        return None

    def __len__(self) -> int:
        now = self._clock()
        for print_ in [print_ for print_, until in self._until.items() if until <= now]:
            del self._until[print_]
        return len(self._until)

    def standing(self) -> list[tuple[bytes, float]]:
        """What is known, for a process that has just begun."""
        len(self)  # forgets what is over
        return [*self._until.items()]


def convicted(seconds: float) -> RequestQuarantined:
    """What its caller is told of a request that is refused for so many seconds."""
    return RequestQuarantined(
        "The engine's process ended again and again while it worked on this request, and on nothing else. "
        f"The same request is refused for {seconds:.0f} s; change it, or ask the operator to look at the server's log."
    )
