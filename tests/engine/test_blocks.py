from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.blocks import BlockPool


def test_the_least_recently_used_idle_block_goes_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.register(block, b"%d" % block)
    pool.release_all([blocks[1]])
    pool.release_all([blocks[0]])
    pool.release_all([blocks[2]])
    pool.share(blocks[1])
    pool.release(blocks[1])
    assert [pool.take(), pool.take(), pool.take()] == [blocks[0], blocks[2], blocks[1]]
    assert pool.cached == 0
    with pytest.raises(LookupError):
        pool.take()


def test_a_prefix_outlives_what_followed_it() -> None:
    pool = BlockPool(4)
    chain = [pool.take() for _ in range(4)]
    for block in chain:
        pool.register(block, b"%d" % block)
    pool.release_all(chain)
    assert [pool.take() for _ in range(4)] == chain[::-1]


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(2, caching=False)
    block = pool.take()
    pool.register(block, b"key")
    assert pool.find(b"key") is None
    pool.release(block)
    assert (pool.available, pool.used, pool.cached) == (2, 0, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release", "register"]), st.integers(0, 99)), max_size=200))
def test_every_block_is_held_idle_or_free(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(6)
    held: list[int] = []
    for action, number in actions:
        if action == "take" and pool.available:
            held.append(pool.take())
        elif action == "share":
            block = pool.find(b"%d" % (number % 9))
            if block is not None:
                pool.share(block)
                held.append(block)
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif action == "register" and held:
            pool.register(held[number % len(held)], b"%d" % (number % 9))
        for block in range(6):
            assert pool.references(block) == held.count(block)
        assert pool.used == len(set(held))
        assert pool.available == 6 - pool.used
    for key in range(9):
        block = pool.find(b"%d" % key)
        assert block is None or pool.idle(block) or block in held
