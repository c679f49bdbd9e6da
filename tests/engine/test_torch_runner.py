"""The runner over torch computes what transformers itself computes, for the real model and for small random ones of other architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import batch
from numpy.typing import NDArray
from reference_model import Reference

from headrace.engine.torch_device import Hardware
from headrace.engine.torch_load import Wanted, load, plan
from headrace.engine.torch_runner import TorchRunner
from headrace.engine.torch_unpaged import UnpagedRunner
from headrace.errors import ModelError, RequestFailed
from headrace.models.as_stored import weights_of
from headrace.models.card import read_object
from headrace.models.tokenizer import load_tokenizer
from headrace.types import ModelFiles

pytestmark = pytest.mark.slow

Runner = TorchRunner | UnpagedRunner

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 259, "max_position_embeddings": 256, "head_dim": 16, "pad_token_id": 0}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Glm4": {},
    "Gemma2": {"sliding_window": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "GptOss": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": {},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def wanted(folder: Path, **changes: Any) -> Wanted:
    plain = Wanted(
        folder=folder,
        tensors=weights_of(folder),
        config=read_object(folder / "config.json"),
        context_length=1024,
        max_sequences=8,
        step_tokens=512,
        num_blocks=96,
        dtype="float32",
    )
    return dataclasses.replace(plain, **changes)


def save_random(folder: Path, architecture: str) -> Path:
    import torch
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**SMALL | ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}{'LMHeadModel' if architecture == 'GPT2' else 'ForCausalLM'}")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 5  # at its usual scale a random model says the same whatever it reads
    model.save_pretrained(folder)
    return folder


def plain_logits(folder: Path, tokens: list[int]) -> NDArray[np.float32]:
    """[T, V] by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: NDArray[np.float32] = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return found


def paged_logits(runner: Runner, tokens: list[int], chunks: list[int], beside: list[int]) -> NDArray[np.float32]:
    """[T, V] in chunks, in blocks out of order, beside another sequence."""
    needed = -(-len(tokens) // 32)
    own = list(range(2 * needed))[::-2]
    found, past = [], 0
    for chunk in chunks:
        end = past + chunk
        parts = [(tokens[past:end], past, own[: -(-end // 32)]), (beside, 0, [2 * needed + i for i in range(-(-len(beside) // 32))])]
        result = runner.forward(batch(parts, list(range(chunk))))
        rows = [result.logits(row) for row in range(chunk)]
        assert (result.top_ids[:, 0] == np.argmax(rows, axis=1)).all()
        assert np.allclose(result.logsumexp, np.log(np.exp(np.array(rows, np.float64)).sum(axis=1)), atol=1e-3)
        found += rows
        past = end
    return np.stack(found)


@pytest.fixture(scope="module")
def prompt(default_model: ModelFiles) -> list[int]:
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    return load_tokenizer(default_model).encode(text)[:120]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_as_transformers_does(architecture: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path / architecture, architecture)
    runner = load(wanted(folder, context_length=200))
    assert isinstance(runner, UnpagedRunner) == (architecture == "Mamba")
    tokens = np.random.default_rng(1).integers(0, 259, 90).tolist()
    got = paged_logits(runner, tokens, [40, 1, 1, 3, 44, 1], tokens[:37])
    assert np.abs(got - plain_logits(folder, tokens)).max() < 1e-3


def test_the_real_model_in_float32(unpacked_model: Path, reference: Reference, prompt: list[int]) -> None:
    runner = load(wanted(unpacked_model))
    got = paged_logits(runner, prompt, [60, 1, 1, 58], prompt[:50])
    assert np.abs(got - plain_logits(unpacked_model, prompt)).max() < 1e-3
    # The file's own weights in float32: rounding them to bfloat16 is all that is between.
    want = reference.logprobs(prompt)
    mine = got - np.log(np.exp(got).sum(axis=1, keepdims=True))
    assert (np.exp(want) * (want - mine)).sum(axis=1).mean() < 0.003
    assert (mine.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.97


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.05), ("int4", 0.6)])
def test_quantized_on_the_cpu(unpacked_model: Path, reference: Reference, prompt: list[int], quantize: Any, most: float) -> None:
    runner = load(wanted(unpacked_model, dtype="auto", quantize=quantize))
    got = paged_logits(runner, prompt, [60, 1, 59], prompt[:20]).astype(np.float64)
    want = reference.logprobs(prompt)
    mine = got - np.log(np.exp(got).sum(axis=1, keepdims=True))
    assert (np.exp(want) * (want - mine)).sum(axis=1).mean() < most


def tiny(tmp_path: Path, **changes: Any) -> TorchRunner:
    runner = load(wanted(save_random(tmp_path / "tiny", "Llama"), context_length=200, **changes))
    assert isinstance(runner, TorchRunner)
    return runner


def failing_beyond(runner: TorchRunner, tokens: int) -> list[int]:
    """Let the device run out of memory in steps of more tokens; the sizes of all steps."""
    import torch

    sizes: list[int] = []
    compute: Callable[..., Any] = runner._model

    def compute_or_fail(*, input_ids: Any, **others: Any) -> Any:
        sizes.append(input_ids.shape[1])
        if input_ids.shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(input_ids=input_ids, **others)

    runner._model = compute_or_fail
    return sizes


def test_out_of_memory_shrinks_the_batch_and_changes_nothing(tmp_path: Path) -> None:
    runner = tiny(tmp_path)
    parts = [([7 * number + place for place in range(10)], 0, [number]) for number in range(8)]
    expected = runner.forward(batch(parts))
    wanted_rows = [expected.logits(row) for row in range(8)]
    sizes = failing_beyond(runner, 25)
    for sizes_wanted in ([80, 40, 20, 20, 20, 20], [20, 20, 20, 20]):
        sizes.clear()
        result = runner.forward(batch(parts))
        assert [result.logits(row) for row in range(8)] == [pytest.approx(row, abs=1e-4) for row in wanted_rows]
        assert result.top_ids.shape == expected.top_ids.shape
        assert sizes == sizes_wanted


def test_out_of_memory_for_one_sequence_fails_it_alone(tmp_path: Path) -> None:
    runner = tiny(tmp_path)
    failing_beyond(runner, 25)
    with pytest.raises(RequestFailed, match="memory"):
        runner.forward(batch([(list(range(30)), 0, [0])]))
    assert np.isfinite(runner.forward(batch([([1], 0, [0])])).logits(0)).all()


def test_deterministic_doesnt_depend_on_the_batch(tmp_path: Path) -> None:
    runner = tiny(tmp_path, deterministic=True)
    assert not runner.rewinds
    parts = [([number + place for place in range(9)], 0, [number]) for number in range(5)]
    together = runner.forward(batch(parts))
    rows = [together.logits(row) for row in range(5)]
    for number, part in enumerate(parts):
        assert (runner.forward(batch([part])).logits(0) == rows[number]).all()


def test_a_step_with_wrong_indices_is_refused(tmp_path: Path) -> None:
    runner = tiny(tmp_path)
    for part in (([400], 0, [0]), ([1], 0, [96])):
        with pytest.raises(RequestFailed, match="beyond its end"):
            runner.forward(batch([part]))


def test_logits_are_the_last_steps_alone(tmp_path: Path) -> None:
    runner = tiny(tmp_path)
    first = runner.forward(batch([([1], 0, [0])]))
    runner.forward(batch([([1], 0, [0])]))
    with pytest.raises(RuntimeError):
        first.logits(0)


def test_blocks_can_be_copied(tmp_path: Path) -> None:
    runner = tiny(tmp_path)
    runner.forward(batch([([5, 6, 7], 0, [0])]))
    want = runner.forward(batch([([8], 3, [0])])).logits(0)
    runner.copy_blocks([(0, 9)])
    assert runner.forward(batch([([8], 3, [9])])).logits(0) == pytest.approx(want, abs=1e-5)


def test_a_model_that_cant_fit_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random(tmp_path / "tiny", "Llama")
    monkeypatch.setattr("headrace.engine.torch_load.free_memory", lambda: 2**20)
    with pytest.raises(ModelError, match=r"doesn't fit: it needs .* the machine's memory has 0\.00 GiB"):
        plan(wanted(folder), Hardware())


def test_a_folder_that_transformers_cant_read_is_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "tiny", "Llama")
    (folder / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ModelError, match="never-heard-of"):
        load(wanted(folder))


@pytest.mark.gpu
def test_on_the_gpu(unpacked_model: Path, prompt: list[int]) -> None:
    runner = load(wanted(unpacked_model, dtype="float32", device="cuda"))
    got = paged_logits(runner, prompt, [60, 1, 59], prompt[:20])
    assert np.abs(got - plain_logits(unpacked_model, prompt)).max() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_quantized_on_the_gpu(unpacked_model: Path, reference: Reference, prompt: list[int], quantize: Any) -> None:
    pytest.importorskip("torchao" if quantize == "int4" else "bitsandbytes", reason="needs headrace[quantize]")
    runner = load(wanted(unpacked_model, dtype="auto", device="cuda", quantize=quantize))
    got = paged_logits(runner, prompt, [60, 1, 59], prompt[:20])
    assert (got.argmax(axis=1) == reference.logprobs(prompt).argmax(axis=1)).mean() > 0.6
