"""The engine computes what the transformers implementation computes, from the same GGUF file.

Tolerances, measured over 500 tokens. With the served model's matrices on both sides, in float32 no logprob differs by more
than 1e-4. Against the file's own weights (the served ones are off by a 32nd of a step at most) the prompt's logprobs differ
by 0.04 at the mean in float32, and by 0.085 as served (bfloat16 or float16 products, activations quantized to 8 bits); the
likeliest token is the same at 98.6 and 95.2 % of the positions; the KL divergence is 0.0013 and 0.007 nats; the perplexity
is 15.78 and 15.75, where the file's is 15.79.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batches import batch
from numpy.typing import NDArray
from reference_model import Reference

from headrace.engine.openvino_runner import OpenVinoRunner
from headrace.models.tokenizer import load_tokenizer
from headrace.types import ModelFiles

pytestmark = pytest.mark.slow

FLOAT32 = 1e-3

# Mean of the prompt's logprobs' differences, share of positions with the same likeliest token, KL divergence in nats.
BOUNDS = {"f32": (0.06, 0.97, 0.003), "auto": (0.15, 0.92, 0.02)}

LoadRunner = Callable[..., OpenVinoRunner]


@pytest.fixture(scope="module")
def prompts(default_model: ModelFiles) -> list[list[int]]:
    """A long one and some short ones."""
    tokenizer = load_tokenizer(default_model)
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    return [tokenizer.encode(text)[:500], *(tokenizer.encode(text[at : at + 200]) for at in (3000, 5000, 7000))]


def logprobs(runner: OpenVinoRunner, tokens: list[int], chunks: list[int], beside: list[list[int]]) -> NDArray[np.float32]:
    """[T, V], computed in chunks of these sizes; others are prefilled `beside` the first and decoded with the rest."""
    size = runner.block_size
    needed = -(-len(tokens) // size)
    # Not in order, so that a model that ignored the table would be found out.
    own = list(range(2 * needed))[::-2]
    tables = [[2 * needed + 8 * number + i for i in range(8)] for number in range(len(beside))]
    found, past, others_past = [], 0, 0
    for chunk in chunks:
        end = past + chunk
        others = [
            (other if not past else [other[-1]], others_past and len(other) + others_past - 1, table)
            for other, table in zip(beside, tables, strict=True)
        ]
        parts = [
            (tokens[past:end], past, own[: -(-end // size)]),
            *((new, before, table[: -(-(before + len(new)) // size)]) for new, before, table in others),
        ]
        result = runner.forward(batch(parts, list(range(chunk))))
        found += [result.logits(row) - result.logsumexp[row] for row in range(chunk)]
        past, others_past = end, others_past + 1
    assert past == len(tokens)
    return np.stack(found)


@pytest.mark.parametrize("chunks", [[500], [200, 200, 100], [1, 31, 33, 128, 1, 1, 255, 50]], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["alone", "in a batch"])
def test_logprobs_in_float32(
    load_runner: LoadRunner, reference_as_served: Reference, prompts: list[list[int]], chunks: list[int], batched: bool
) -> None:
    got = logprobs(load_runner(precision="f32"), prompts[0], chunks, prompts[1:] if batched else [])
    assert np.abs(got - reference_as_served.logprobs(prompts[0])).max() < FLOAT32


@pytest.mark.parametrize(("precision", "deterministic"), [("f32", False), ("auto", False), ("auto", True)])
def test_logprobs_against_the_file(
    load_runner: LoadRunner, reference: Reference, prompts: list[list[int]], precision: str, deterministic: bool
) -> None:
    runner = load_runner(precision=precision, **({"deterministic": True} if deterministic else {}))
    got, want = logprobs(runner, prompts[0], [200, 300], prompts[1:]), reference.logprobs(prompts[0])
    mean, same, divergence = BOUNDS[precision]
    following = np.array(prompts[0][1:])
    difference = (got - want)[np.arange(len(following)), following]
    assert np.abs(difference).mean() < mean
    assert abs(difference.mean()) < mean / 3
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > same
    assert (np.exp(want) * (want - got)).sum(axis=1).mean() < divergence


def test_greedy_in_float32(load_runner: LoadRunner, reference_as_served: Reference, prompts: list[list[int]]) -> None:
    runner = load_runner(precision="f32")
    count, size = 24, runner.block_size
    needed = [-(-(len(prompt) + count) // size) for prompt in prompts]
    tables = [list(range(sum(needed[:number]), sum(needed[: number + 1]))) for number in range(len(prompts))]
    drawn: list[list[int]] = [[] for _ in prompts]
    new, past = [*prompts], [0] * len(prompts)
    for _ in range(count):
        result = runner.forward(batch([(tokens, before, table) for tokens, before, table in zip(new, past, tables, strict=True)]))
        past = [before + len(tokens) for before, tokens in zip(past, new, strict=True)]
        new = [[token] for token in result.top_ids[:, 0].tolist()]
        for tokens, token in zip(drawn, new, strict=True):
            tokens += token
    for prompt, tokens in zip(prompts, drawn, strict=True):
        assert tokens == reference_as_served.likeliest(prompt, tokens)
