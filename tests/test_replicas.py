"""Which replica gets a request."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from headrace.engines import EngineClient
from headrace.replicas import BLOCK, Replicas
from headrace.types import Delta, EngineStats, Event, GenerateRequest, Report, Sampling


class Ready(EngineClient):
    """One with a worker, which says what it is asked for, a token a batch."""

    ready = True

    def __init__(self) -> None:
        super().__init__("nowhere")
        self.asked: list[str] = []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        self.asked.append(request.id)
        for index in range(request.sampling.max_tokens):
            yield [Delta(0, index, (index,), "x")]
        yield [Report(0, 0, 0, 0.0, 0.0, 0.0)]


def request(id: str, prompt: list[int], tokens: int = 10, tenant: int = 1) -> GenerateRequest:
    return GenerateRequest(id=id, prompt=prompt, sampling=Sampling(max_tokens=tokens), tenant=tenant)


LONG, OTHER = list(range(8 * BLOCK)), list(range(1000, 1000 + 8 * BLOCK))


@pytest.mark.anyio
async def test_the_fewest_tokens_ahead_first_unless_a_known_beginning_saves_more() -> None:
    clients = [Ready(), Ready(), Ready()]
    replicas = Replicas(clients)
    running = [replicas.generate(request("a", LONG)), replicas.generate(request("b", OTHER))]
    for each in running:
        await anext(each)
    assert [client.asked for client in clients] == [["a"], ["b"], []]
    # The third is idle, but the first has nearly all of this prompt.
    assert replicas.choose(request("c", [*LONG, 1])) in (0, 2)
    for each in running:
        await each.aclose()
    assert replicas.choose(request("d", [*OTHER, 5])) == 1
    # Another tenant's beginning is nobody's.
    assert replicas.choose(request("e", [*OTHER, 5], tenant=2)) == 0


@pytest.mark.anyio
async def test_one_that_is_much_busier_isnt_chosen_for_its_cache() -> None:
    replicas = Replicas([Ready(), Ready()])
    running = [replicas.generate(request(str(number), LONG, 200)) for number in range(2)]
    await anext(running[0])
    assert replicas.choose(request("x", LONG)) == 1
    for each in running:
        await each.aclose()


@pytest.mark.anyio
async def test_what_is_done_is_taken_off() -> None:
    clients = [Ready(), Ready()]
    replicas = Replicas(clients)
    for number in range(4):
        assert len([batch async for batch in replicas.generate(request(str(number), [1], 5))]) == 6
    assert replicas._ahead == [0, 0]
    assert replicas.stats() == EngineStats()
