"""vLLM as the vllm engine starts it: its arguments, its environment, its processes.

vLLM computes in processes of its own, children of the worker's. They have to be gone when the worker is, however that ended: they hold
the GPU's memory that its successor needs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.engine.kv_budget import SHARE, free_memory
from headrace.errors import ModelError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

INSTALL = "pip install 'headrace[vllm]'"

_held: list[int] = []
"""The guard's pipe."""

_CPU_STEP = 2048
"""Tokens of a step on a CPU, where the context isn't longer."""

_ENVIRONMENT = {
    # What is said goes through our own log; of vLLM's, warnings.
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # The model is a folder here: nothing is asked of a hub.
    "HF_HUB_OFFLINE": "1",
    # A fork would take the worker's sockets along.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the engine is to load, and with how much memory."""

    folder: Path
    context_length: int
    """0: the model's own."""
    max_sequences: int
    step_tokens: int | None
    """None is vLLM's own choice, by the hardware."""
    dtype: str
    device: str
    trust_remote_code: bool
    threads: int | None
    tensor_parallel: int
    pipeline_parallel: int
    gpu_memory_utilization: float
    kv_bytes: int | None
    memory_share: float
    beside_another: bool
    """Memory is left for a second engine like it."""
    prefix_cache: bool


def load(wanted: Wanted, stats_logger: Any) -> AsyncLLM:
    """vLLM, ready to serve. Blocks for as long as that takes; minutes where it compiles. Raises `ModelError`."""
    if importlib.util.find_spec("vllm") is None:
        raise ModelError(f"This takes the vllm engine, which isn't installed: {INSTALL}.")
    _set_environment(wanted)
    _end_children_with_this_process()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    on_cpu = current_platform.is_cpu()
    _check_device(wanted.device, current_platform.device_type)
    arguments = AsyncEngineArgs(
        model=str(wanted.folder),
        skip_tokenizer_init=True,
        trust_remote_code=wanted.trust_remote_code,
        dtype=wanted.dtype,
        max_model_len=wanted.context_length or None,
        max_num_seqs=wanted.max_sequences,
        max_num_batched_tokens=_step_tokens(wanted, on_cpu),
        # On a CPU a seeded request whose prompt is cut into chunks ends vLLM's engine: the generator can't take a draw back there.
        enable_chunked_prefill=False if on_cpu else None,
        tensor_parallel_size=wanted.tensor_parallel,
        pipeline_parallel_size=wanted.pipeline_parallel,
        gpu_memory_utilization=wanted.gpu_memory_utilization * _part(wanted),
        kv_cache_memory_bytes=_cpu_bytes(wanted) if on_cpu else None if wanted.kv_bytes is None else int(wanted.kv_bytes * _part(wanted)),
        enable_prefix_caching=wanted.prefix_cache,
        scheduling_policy="priority",
        disable_log_stats=True,
        enable_log_requests=False,
    )
    try:
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[stats_logger])
    except (ValueError, RuntimeError, OSError, NotImplementedError, AssertionError, ImportError) as error:
        # vLLM has no error of its own for a model that it can't serve; the cause, in its engine's process, is in the log.
        raise ModelError(f"vLLM can't serve {wanted.folder.name}: {str(error) or type(error).__name__}") from error


def _step_tokens(wanted: Wanted, on_cpu: bool) -> int | None:
    if wanted.step_tokens is None and not on_cpu:
        return None
    whole_prompt = wanted.context_length if on_cpu else 0
    return max(wanted.step_tokens or _CPU_STEP, wanted.max_sequences, whole_prompt)


def _part(wanted: Wanted) -> float:
    return wanted.memory_share / (2 if wanted.beside_another else 1)


def _set_environment(wanted: Wanted) -> None:
    """What vLLM only takes as variables; what the operator has set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if wanted.threads is not None and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        ranks = wanted.tensor_parallel * wanted.pipeline_parallel
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
        if wanted.threads * ranks > len(cpus):
            each = f" for each of {ranks} ranks" if ranks > 1 else ""
            raise ModelError(f"threads = {wanted.threads}{each} is more than the {len(cpus)} processors that vLLM could bind them to.")
        bound = [cpus[rank * wanted.threads : (rank + 1) * wanted.threads] for rank in range(ranks)]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, part)) for part in bound)


def _check_device(device: str, found: str) -> None:
    if device != "auto" and device.partition(":")[0] != found:
        raise ModelError(f"device = {device}, but this vLLM was built for {found}.")
    if ":" in device:
        raise ModelError(f"device = {device}: vLLM takes the GPUs that CUDA_VISIBLE_DEVICES shows. Set that, and device = cuda.")


def _cpu_bytes(wanted: Wanted) -> int:
    """Memory for keys and values on a CPU: as configured, or a part of what is free and no more than the batch can fill.

    vLLM would take a share of all memory there is, and refuse to start where so much isn't free.
    """
    if wanted.kv_bytes is not None:
        return int(wanted.kv_bytes * wanted.memory_share)
    weights = sum(path.stat().st_size for pattern in ("*.safetensors", "*.bin") for path in wanted.folder.glob(pattern))
    # Each rank has its own part of the weights and of the keys and values.
    free = max(0, free_memory() - weights)
    budget = int(free * SHARE * _part(wanted)) // (wanted.tensor_parallel * wanted.pipeline_parallel)
    token = _bytes_per_token(wanted.folder / "config.json")
    if token and wanted.context_length:
        budget = min(budget, token * wanted.context_length * wanted.max_sequences)
    return budget


def _bytes_per_token(config: Path) -> int:
    """Of keys and values over all layers, in two bytes an element; 0 where the model doesn't say it in the usual words."""
    try:
        settings = json.loads(config.read_bytes())
        inner = {**settings, **settings.get("text_config", {})}
        heads = inner.get("num_key_value_heads") or inner["num_attention_heads"]
        width = inner.get("head_dim") or inner["hidden_size"] // inner["num_attention_heads"]
        return int(2 * 2 * inner["num_hidden_layers"] * heads * width)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _end_children_with_this_process() -> None:
    """A guard kills the process group once this process is gone, even where it was killed itself.

    vLLM's engine process doesn't notice its parent's death. The guard waits for the end of a pipe that only this process holds; it does
    nothing where the group has another leader, as in tests, where closing the engine has to be enough.
    """
    if sys.platform == "win32" or os.getpgrp() != os.getpid():
        return
    end, held = os.pipe()  # neither is inherited, but for the guard's standard input
    subprocess.Popen(("/bin/sh", "-c", "read -r _; kill -9 0"), stdin=end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(end)
    # Left open on purpose, and never written to: the process's end closes it.
    _held.append(held)
