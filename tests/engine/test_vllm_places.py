"""Who goes first in vLLM's line: the higher rank, and within a rank tenants by turns."""

from __future__ import annotations

from headrace.engine.vllm_sampling import Places
from headrace.types import GenerateRequest, Sampling


def request(tenant: int, *, rank: int = 3, tokens: int = 100) -> GenerateRequest:
    return GenerateRequest(id="r", prompt=[1] * tokens, sampling=Sampling(max_tokens=50), tenant=tenant, rank=rank)


def test_a_newcomer_is_ahead_of_a_tenant_with_many() -> None:
    places = Places()
    many = [places.take(request(1)) for _ in range(5)]
    newcomer = places.take(request(2))
    assert many == sorted(many)
    assert newcomer == many[0] < many[1]


def test_a_tenant_that_was_away_has_saved_nothing() -> None:
    places = Places()
    busy = [places.take(request(1)) for _ in range(10)]
    places.served(busy[7])
    late = [places.take(request(2)) for _ in range(2)]
    assert late[0] == busy[7]
    assert busy[8] == late[1]


def test_rank_comes_first_however_much_was_served() -> None:
    places = Places()
    for _ in range(1000):
        low = places.take(request(1, rank=2, tokens=100_000))
    assert places.take(request(1, rank=3, tokens=100_000)) < low


def test_an_idle_engine_forgets() -> None:
    places = Places()
    first = places.take(request(1))
    places.take(request(1))
    places.rest()
    assert places.take(request(1)) == first
