"""Whether a model will fit, computed before it is loaded: its weights, its keys and values, and what computing takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.engine.torch_device import BYTES
from headrace.engine.torch_quantize import BITS
from headrace.errors import ModelError
from headrace.types import StoredTensor

MIB = 2**20
GIB = 2**30

_PROCESS = {"cpu": 700 * MIB, "cuda": 600 * MIB, "mps": 600 * MIB}
"""Beside the model: torch and transformers themselves on a CPU (measured), the context and the libraries' work space on a GPU."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Fit:
    """What serving a model takes, in bytes."""

    weights: int
    weights_text: str
    """How they come to be so many."""
    kv_per_token: int
    context: int
    working: int

    @property
    def needed(self) -> int:
        """With keys and values of one full context."""
        return self.weights + self.kv_per_token * self.context + self.working

    def __str__(self) -> str:
        return (
            f"{_gib(self.needed)}: weights {_gib(self.weights)} ({self.weights_text}), keys and values of one context "
            f"{_gib(self.kv_per_token * self.context)} ({self.context:,} tokens × {self.kv_per_token / 1024:,.1f} KiB), "
            f"computing {_gib(self.working)}"
        )


def reckon(
    tensors: Sequence[StoredTensor],
    config: Mapping[str, Any],
    *,
    kind: str,
    dtype: str,
    quantize: str | None,
    context: int,
    max_sequences: int,
    step_tokens: int,
) -> Fit:
    """`tensors` as the weights' headers list them, `config` as config.json has it."""
    text = config.get("text_config")
    inner: Mapping[str, Any] = {**config, **text} if isinstance(text, dict) else config
    weights, said = _weights(tensors, dtype, quantize, kind, bool(config.get("quantization_config")))
    size = BYTES[dtype]
    hidden, vocabulary = _number(inner, "hidden_size", "n_embd", "d_model"), _number(inner, "vocab_size")
    wide = _number(inner, "intermediate_size", "n_inner") or 4 * hidden
    # A step's widest layer, and its rows' logits: in the model's type, in float32, and as exponentials.
    working = step_tokens * (8 * hidden + 3 * wide) * size + max_sequences * vocabulary * 12
    return Fit(weights, said, kv_per_token(inner, size), context, working + _PROCESS[kind])


def kv_per_token(config: Mapping[str, Any], size: int) -> int:
    """Bytes of keys and values of all layers, for usual attention; 0 where the configuration says too little."""
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _number(config, "num_attention_heads", "n_head")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    shared = _number(config, "num_key_value_heads", "multi_query_group_num") or heads
    head = _number(config, "head_dim") or (hidden // heads if heads else 0)
    return 2 * layers * shared * head * size


def check_fit(fit: Fit, free: int, where: str) -> None:
    """Raises `ModelError` with the arithmetic where a model can't fit into what is free."""
    if fit.needed > free:
        raise ModelError(
            f"The model doesn't fit: it needs {fit}; {where} has {_gib(free)} for it. "
            "Take a smaller model, --quantize int8 or int4, or a shorter --context."
        )


def _weights(tensors: Sequence[StoredTensor], dtype: str, quantize: str | None, kind: str, stored_quantized: bool) -> tuple[int, str]:
    as_stored = sum(tensor.size for tensor in tensors)
    if stored_quantized:
        return as_stored, "as the checkpoint has them"
    whole = sum(tensor.elements * BYTES[dtype] if tensor.dtype in _FLOATS else tensor.size for tensor in tensors)
    elements = sum(tensor.elements for tensor in tensors)
    if quantize is None:
        return whole, f"{elements / 1e9:,.2f} billion in {dtype}"
    matrices = sum(tensor.elements for tensor in tensors if len(tensor.shape) == 2 and not _outer(tensor.name))
    small = whole - matrices * BYTES[dtype] + int(matrices * BITS[quantize] / 8)
    if kind == "cpu":
        return whole, f"{elements / 1e9:,.2f} billion in {dtype} while loading, {_gib(small)} as {quantize} afterwards"
    return small, f"{matrices / 1e9:,.2f} of {elements / 1e9:,.2f} billion as {quantize}, the others in {dtype}"


def _outer(name: str) -> bool:
    return any(word in name for word in ("embed", "lm_head", "wte", "wpe", "output_layer"))


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
