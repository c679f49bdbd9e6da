"""KV blocks get their memory before a step writes to them."""

import sys
import time

import numpy as np
import pytest

from headrace.engine.populate import Populate

BLOCK = 16 * 1024
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_WRITE is Linux's")


def until(populate: Populate, blocks: int) -> None:
    end = time.monotonic() + 10
    while populate.done < blocks and populate._thread.is_alive() and time.monotonic() < end:
        time.sleep(0.001)


def test_memory_is_there_ahead_of_the_blocks_in_use_and_no_byte_changes() -> None:
    layers = [np.zeros(256 * BLOCK, np.uint8) for _ in range(2)]
    layers[0][:100] = 7
    populate = Populate([(layer.ctypes.data, BLOCK) for layer in layers], 256, ahead=64 * 2 * BLOCK)
    populate.start()
    until(populate, 65)
    if not populate._thread.is_alive():
        pytest.skip("this kernel is older than 5.14")
    assert populate.done == 65
    populate.reach(3)
    populate.reach(100)
    until(populate, 165)
    assert populate.done == 165
    populate.reach(255)
    until(populate, 256)
    assert populate.done == 256
    populate.close()
    assert not populate._thread.is_alive()
    assert (layers[0][:100] == 7).all()
    assert not layers[0][100:].any()
    assert not layers[1].any()
