"""Tensor parallelism, with processes in place of GPUs: two halves of each layer compute what the whole computes."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import psutil
import pytest

from headrace.config import ModelSection
from headrace.engine.vllm_engine import VllmEngine
from headrace.engine.vllm_load import Wanted
from headrace.models.byte_tokenizer import CHATML
from headrace.models.resolve import resolve
from headrace.models.tokenizer import load_tokenizer
from headrace.types import Delta, GenerateRequest, Sampling
from models.tiny_llama import VOCABULARY, byte_level_tokenizer

pytestmark = pytest.mark.anyio

PROMPT = [*range(40, 90)]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with heads of a size that vLLM's attention for CPUs knows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.3)
    folder = tmp_path_factory.mktemp("small") / "small"
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return folder


def expected(folder: Path, count: int) -> list[int]:
    """By transformers, greedily."""
    import torch
    from transformers import LlamaForCausalLM

    model, tokens = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), [*PROMPT]
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
async def test_two_halves_compute_what_the_whole_does(small_model: Path) -> None:
    files = resolve(ModelSection(model=str(small_model), engine="vllm"))
    assert files.kind == "vllm"
    wanted = Wanted(
        folder=Path(files.folder),
        context_length=files.context_length,
        max_sequences=4,
        step_tokens=64,
        dtype="float32",
        device="cpu",
        trust_remote_code=False,
        threads=1,
        tensor_parallel=2,
        pipeline_parallel=1,
        gpu_memory_utilization=0.9,
        kv_bytes=2**26,
        memory_share=1.0,
        beside_another=False,
        prefix_cache=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Set by the engine; in a worker's process it would be gone with it.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])))
        engine = VllmEngine(wanted, load_tokenizer(files), name=files.name, fingerprint=files.fingerprint)
        await engine.start()
    try:
        request = GenerateRequest(id="halves", prompt=PROMPT, sampling=Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
        said = [token async for batch in engine.generate(request) for event in batch if isinstance(event, Delta) for token in event.tokens]
        assert said == expected(small_model, 12)
        cores = [child for child in psutil.Process().children() if "EngineCore" in " ".join(child.cmdline())]
        for core in cores:
            core.kill()
        # Nobody asks for anything meanwhile.
        await asyncio.wait_for(engine.failed.wait(), 30)
    finally:
        await engine.close()
