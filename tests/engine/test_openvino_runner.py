from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from batches import batch

from headrace.engine.openvino_runner import OpenVinoRunner
from headrace.errors import ModelError, RequestFailed
from headrace.types import ModelFiles

pytestmark = pytest.mark.slow

LoadRunner = Callable[..., OpenVinoRunner]
TOKENS = list(range(1000, 1070))


@pytest.fixture
def runner(load_runner: LoadRunner) -> OpenVinoRunner:
    return load_runner()


def test_candidates_and_logsumexp_are_those_of_the_logits(runner: OpenVinoRunner) -> None:
    result = runner.forward(batch([(TOKENS, 0, [0, 1, 2])], [0, 20, 69]))
    assert result.top_ids.shape == result.top_logits.shape == (3, 64)
    assert (result.top_ids.dtype, result.top_logits.dtype, result.logsumexp.dtype) == (np.int64, np.float32, np.float32)
    for row in range(3):
        logits = result.logits(row)
        assert logits.shape == (runner.vocab_size,)
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(result.top_logits[row], np.sort(logits)[::-1][:64])
        np.testing.assert_array_equal(logits[result.top_ids[row]], result.top_logits[row])
        np.testing.assert_array_equal(
            result.top_ids[row], sorted(result.top_ids[row], key=lambda token, logits=logits: (-logits[token], token))
        )
        exact = logits.astype(np.float64)
        # The sampler allows for 1e-4 (`candidates.SLACK`).
        assert result.logsumexp[row] == pytest.approx(np.log(np.exp(exact - exact.max()).sum()) + exact.max(), abs=3e-5)
        logits[:] = 0
        assert result.logits(row).any(), "a row is a copy"


def test_many_rows_and_none(runner: OpenVinoRunner) -> None:
    assert runner.forward(batch([(TOKENS, 0, [0, 1, 2])], [])).top_ids.shape == (0, 64)
    result = runner.forward(batch([(TOKENS, 0, [0, 1, 2])], list(range(70))))
    assert result.logsumexp.shape == (70,)
    assert np.isfinite(result.logsumexp).all()


def test_the_likeliest_alone(runner: OpenVinoRunner) -> None:
    # As many rows as there are: in a few of them two tokens are the likeliest.
    whole = runner.forward(batch([(TOKENS, 0, [0, 1, 2])], list(range(70))))
    asked = batch([(TOKENS, 0, [0, 1, 2])], list(range(70)))
    asked.best_only = True
    alone = runner.forward(asked)
    assert alone.top_ids.shape == alone.top_logits.shape == (70, 1)
    np.testing.assert_array_equal(alone.top_ids, whole.top_ids[:, :1])
    np.testing.assert_array_equal(alone.top_logits, whole.top_logits[:, :1])
    assert np.isfinite(alone.logsumexp).all()


def test_rows_are_read_before_the_next_step(runner: OpenVinoRunner) -> None:
    result = runner.forward(batch([(TOKENS, 0, [0, 1, 2])]))
    runner.forward(batch([(TOKENS, 0, [0, 1, 2])]))
    with pytest.raises(RuntimeError, match="after the next step"):
        result.logits(0)


def test_copied_blocks_hold_the_same(runner: OpenVinoRunner) -> None:
    runner.forward(batch([(TOKENS, 0, [0, 1, 2])]))
    wanted = runner.forward(batch([([5], 70, [0, 1, 2])])).logits(0)
    runner.copy_blocks([])
    runner.copy_blocks([(1, 11), (2, 12)])
    runner.forward(batch([([9] * 70, 0, [3, 1, 2])]))
    np.testing.assert_array_equal(runner.forward(batch([([5], 70, [0, 11, 12])])).logits(0), wanted)


def test_an_index_beyond_its_end_is_refused_and_harms_nothing(runner: OpenVinoRunner) -> None:
    wanted = runner.forward(batch([(TOKENS, 0, [0, 1, 2])])).logits(0)
    for wrong in (
        batch([([runner.vocab_size], 0, [5])]),
        batch([([-1], 0, [5])]),
        batch([([1], 0, [runner.num_blocks])]),
        batch([([1], 0, [-1])]),
        batch([([1], 0, [5])], [1]),
    ):
        with pytest.raises(RequestFailed, match="beyond its end"):
            runner.forward(wrong)
    np.testing.assert_array_equal(runner.forward(batch([(TOKENS, 0, [0, 1, 2])])).logits(0), wanted)


def test_deterministic_means_whatever_else_is_in_the_batch(load_runner: LoadRunner) -> None:
    runner = load_runner(deterministic=True)
    alone = runner.forward(batch([(TOKENS, 0, [0, 1, 2])])).logits(0)
    others = [([7 * number + i for i in range(3 + number)], 0, [10 + number]) for number in range(20)]
    together = runner.forward(batch([*others[:9], (TOKENS, 0, [0, 1, 2]), *others[9:]]))
    assert len(together.logsumexp) == 21
    np.testing.assert_array_equal(together.logits(9), alone)
    np.testing.assert_array_equal(together.top_logits[9], np.sort(alone)[::-1][:64])


def test_the_interpreter_is_free_during_a_step(runner: OpenVinoRunner) -> None:
    step = batch([(list(range(1000, 1512)), 0, list(range(16)))])
    began, turns, ended = threading.Event(), 0, threading.Event()

    def work() -> None:
        began.set()
        runner.forward(step)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    while not ended.is_set():
        turns += 1
    thread.join()
    assert turns > 1000


def test_blocks_from_a_budget(default_model: ModelFiles) -> None:
    settings = {"num_blocks": None, "context_length": 64, "max_sequences": 3, "threads": 1}
    small = OpenVinoRunner(default_model.folder, kv_bytes=2**30, **settings)  # type: ignore[arg-type]
    small.load()
    assert small.num_blocks == 6
    assert "openvino" in small.numerics
    with pytest.raises(ModelError, match="kv_cache_gib"):
        OpenVinoRunner(default_model.folder, kv_bytes=2**19, **settings).load()  # type: ignore[arg-type]
