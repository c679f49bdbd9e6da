"""Several workers that serve one model, as one engine: who gets a request, and where it goes on when a worker dies.

A request goes to the worker with the fewest tokens ahead of it (prompts and answers under way), less the tokens of its prompt that the
worker has had before, in an earlier request of the same tenant: those are probably in its prefix cache, and cost nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import msgspec

from headrace.engines import EngineClient
from headrace.errors import HeadraceError
from headrace.quarantine import Quarantine
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest
from headrace.waiting import Bounds, Queue

BLOCK = 32
"""Tokens by which prompts are compared, as many as a KV block of the own engine holds."""
MOST_BLOCKS = 64
"""Blocks of a prompt's beginning that are looked at."""
REMEMBERED = 8192
"""Beginnings that are remembered."""
EXPECTED = 256
"""Tokens that an answer is taken to have at most, until it has more: few requests use up what they allow."""


class Replicas:
    """`ports.Engine`, and all that the rest of an API process wants of an `EngineClient`."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self.clients = tuple(clients)
        for client in clients:
            client.elsewhere = self._instead_of
        self._ahead = [0] * len(self.clients)
        """Tokens of the requests that each has, what is done of them taken off."""
        self._beginnings: OrderedDict[int, int] = OrderedDict()
        """By the hash of a prompt's beginning, who had it last."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        """As `EngineClient.generate`."""
        number = self.choose(request)
        left = len(request.prompt) + min(request.sampling.max_tokens, EXPECTED) * request.sampling.n
        self._ahead[number] += left
        try:
            async with aclosing(self.clients[number].generate(request)) as batches:
                async for batch in batches:
                    done = sum(len(event.tokens) for event in batch if type(event) is Delta)
                    done = min(left, done)
                    left -= done
                    self._ahead[number] -= done
                    yield batch
        finally:
            self._ahead[number] -= left

    def choose(self, request: GenerateRequest) -> int:
        """Which of them gets the request; it is remembered that it did."""
        beginnings = self._hashes(request)
        known: dict[int, int] = {}
        for length, beginning in enumerate(beginnings, 1):
            owner = self._beginnings.get(beginning)
            if owner is not None:
                known[owner] = length * BLOCK
        ready = [number for number, client in enumerate(self.clients) if client.ready] or list(range(len(self.clients)))
        chosen = min(ready, key=lambda number: (self._ahead[number] - known.get(number, 0), self.clients[number].waiting))
        for beginning in beginnings:
            self._beginnings[beginning] = chosen
            self._beginnings.move_to_end(beginning)
        while len(self._beginnings) > REMEMBERED:
            self._beginnings.popitem(last=False)
        return chosen

    def _hashes(self, request: GenerateRequest) -> list[int]:
        hashes, so_far = [], hash(request.tenant)
        for begin in range(0, min(len(request.prompt) // BLOCK, MOST_BLOCKS) * BLOCK, BLOCK):
            so_far = hash((so_far, *request.prompt[begin : begin + BLOCK]))
            hashes.append(so_far)
        return hashes

    def _instead_of(self, dead: EngineClient) -> EngineClient | None:
        ready = [number for number, client in enumerate(self.clients) if client is not dead and client.ready]
        return self.clients[min(ready, key=lambda number: self._ahead[number])] if ready else None

    def one_is_ready(self) -> None:
        """One has a worker: what waits for others' workers goes on there."""
        for client in self.clients:
            if not client.ready:
                client.move_on()

    # As of one

    def connect(self) -> None:
        for client in self.clients:
            client.connect()

    async def start(self) -> EngineCard:
        return await self.clients[0].start()

    async def close(self) -> None:
        for client in self.clients:
            await client.close()

    @property
    def ready(self) -> bool:
        return any(client.ready for client in self.clients)

    @property
    def worker_pid(self) -> int:
        return next((client.worker_pid for client in self.clients if client.ready), 0)

    @property
    def waiting(self) -> int:
        return sum(client.waiting for client in self.clients)

    @property
    def resumed(self) -> int:
        return sum(client.resumed for client in self.clients)

    @property
    def quarantined(self) -> Quarantine:
        return self.clients[0].quarantined

    @property
    def not_loaded(self) -> str:
        return self.clients[0].not_loaded

    @not_loaded.setter
    def not_loaded(self, why: str) -> None:
        for client in self.clients:
            client.not_loaded = why

    @property
    def in_use(self) -> bool:
        return any(client.in_use for client in self.clients)

    def give_up(self, error: HeadraceError) -> None:
        for client in self.clients:
            client.give_up(error)

    def hope(self) -> None:
        for client in self.clients:
            client.hope()

    def quarantine(self, print_: bytes, until: float) -> None:
        for client in self.clients:
            client.quarantine(print_, until)

    def end_all(self, error: HeadraceError) -> None:
        for client in self.clients:
            client.end_all(error)

    def fail_waiting(self, error: HeadraceError) -> None:
        for client in self.clients:
            client.fail_waiting(error)

    def pause(self, told: Callable[[], None]) -> None:
        left = len(self.clients)

        def one_told() -> None:
            nonlocal left
            left -= 1
            if not left:
                told()

        for client in self.clients:
            client.pause(one_told)

    def unpause(self) -> None:
        for client in self.clients:
            client.unpause()

    def crowd(self) -> tuple[Queue, Bounds] | None:
        """Only if all are crowded; that of the one that the next request would go to."""
        crowds = [client.crowd() for client in self.clients if client.ready]
        return None if not crowds or None in crowds else crowds[0]

    def stats(self) -> EngineStats:
        """All of them added up."""
        return added_up([client.stats() for client in self.clients])

    async def refresh(self, timeout: float = 1.0) -> EngineStats:
        for client in self.clients:
            await client.refresh(timeout)
        return self.stats()


def added_up(stats: Sequence[EngineStats]) -> EngineStats:
    """Over several workers; of waits the shortest."""
    names = EngineStats.__struct_fields__
    summed = {name: sum(getattr(each, name) for each in stats) for name in names}
    summed["predicted_wait"] = min((each.predicted_wait for each in stats), default=0.0)
    return msgspec.convert(summed, EngineStats)
