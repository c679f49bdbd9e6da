"""Weights in 8 or 4 bits, made while a model is loaded: what each device can do, and what is refused with the reason.

| | CPU | CUDA |
|---|---|---|
| int8 | torch's own kernel, a scale a row | bitsandbytes (LLM.int8, Dettmers et al. 2022) where it is installed, else torchao |
| int4 | torch's own kernel, groups of 32 to 128 | torchao, groups of 128 |
| nf4 | refused | bitsandbytes (QLoRA, Dettmers et al. 2023) |

On a CPU torchao 0.18 unpacks 8-bit weights anew in each step, which is slower than bfloat16, and has no 4-bit layout at all; the kernels
that torch brings, `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`, multiply them as they are.
Embeddings and the last matrix stay as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from headrace.engine.torch_device import Place
from headrace.errors import ModelError

if TYPE_CHECKING:
    import torch

Quantize = Literal["int8", "int4", "nf4"]

BITS: dict[str, float] = {"int8": 8.1, "int4": 4.5, "nf4": 4.6}
"""Bits a weight, scales included."""

_GROUPS = (128, 64, 32)
_MANY_ROWS = 48
"""From here on unpacking 8-bit weights once and multiplying in bfloat16 is faster than the kernel for few rows (2 cores, AVX-512)."""

_PACKAGES = {
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "torchao": ("torchao", "torchao"),
    "hqq": ("hqq", "hqq"),
    "aqlm": ("aqlm", "aqlm[gpu,cpu]"),
    "quanto": ("optimum", "optimum-quanto"),
    "auto-round": ("auto_round", "auto-round"),
    "mxfp4": ("kernels", "kernels"),
}
"""Of checkpoints that come quantized: the module that transformers needs, and what to install."""


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_quantize(quantize: Quantize, place: Place, dtype: str, stored: str | None, installed: Callable[[str], bool] = _installed) -> None:
    """Raises `ModelError` for what the device, or what is installed, can't do; `stored` is how the checkpoint is quantized already."""
    if stored is not None:
        raise ModelError(f"quantize = {quantize}: the checkpoint is quantized already ({stored}). Leave the option out.")
    if place.kind == "mps":
        raise ModelError(f"quantize = {quantize} isn't possible on Apple's GPU: neither bitsandbytes nor torchao has kernels for it here.")
    if place.kind == "cpu":
        if quantize == "nf4":
            raise ModelError("quantize = nf4 needs a CUDA GPU (bitsandbytes). On a CPU take int8 or int4.")
        if dtype != "bfloat16":
            raise ModelError(f"quantize = {quantize} computes in bfloat16 on a CPU; dtype = {dtype} isn't possible with it.")
        return
    if quantize == "nf4" and not installed("bitsandbytes"):
        raise ModelError("quantize = nf4 needs bitsandbytes: pip install 'headrace[quantize]'.")
    if quantize == "int8" and not (installed("bitsandbytes") or installed("torchao")):
        raise ModelError("quantize = int8 needs bitsandbytes or torchao: pip install 'headrace[quantize]'.")
    if quantize == "int4":
        if not installed("torchao"):
            raise ModelError("quantize = int4 needs torchao on a GPU: pip install 'headrace[quantize]'.")
        if dtype != "bfloat16":
            raise ModelError(f"quantize = int4 computes in bfloat16 on a GPU (Ampere and later); dtype = {dtype} isn't possible with it.")


def check_stored(stored: str | None, place: Place, installed: Callable[[str], bool] = _installed) -> None:
    """Raises `ModelError` where a checkpoint that comes quantized needs something that isn't here."""
    if stored is None:
        return
    if stored in _PACKAGES and not installed(_PACKAGES[stored][0]):
        raise ModelError(f"The checkpoint is quantized as {stored}, which transformers reads with {_PACKAGES[stored][1]}: install it.")
    if stored in ("fbgemm_fp8", "nvfp4", "eetq") and place.kind != "cuda":
        raise ModelError(f"The checkpoint is quantized as {stored}, which needs a CUDA GPU; this is {place.kind}.")


def loading_config(quantize: Quantize | None, place: Place, dtype: torch.dtype) -> Any:
    """For `from_pretrained`, where a library quantizes while it loads; None otherwise."""
    if quantize is None or place.kind == "cpu":
        return None
    if quantize == "nf4" or (quantize == "int8" and _installed("bitsandbytes")):
        import transformers

        settings: Any = transformers.BitsAndBytesConfig

        if quantize == "int8":
            return settings(load_in_8bit=True)
        return settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True)
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if quantize == "int8":
        return TorchAoConfig(quant_type=Int8WeightOnlyConfig(version=2))
    return TorchAoConfig(quant_type=Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))


def pack_for_cpu(model: Any, quantize: Quantize) -> int:
    """Replace the model's linear layers, all but the last, by quantized ones, one after the other; gives their number.

    Raises `ModelError` where there are none.
    """
    import torch

    last = model.get_output_embeddings()
    # By name first: replacing while walking would change what is walked.
    found = [(name, module) for name, module in model.named_modules() if type(module) is torch.nn.Linear and module is not last]
    count = 0
    for name, module in found:
        packed = _packed(module, quantize)
        if packed is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, packed)
            count += 1
    if not count:
        raise ModelError(f"quantize = {quantize}: the model has no linear layers whose sizes the kernels take.")
    return count


def _packed(linear: torch.nn.Linear, quantize: Quantize) -> torch.nn.Module | None:
    rows, columns = linear.weight.shape
    if quantize == "int8":
        return int8_linear(linear)
    group = next((size for size in _GROUPS if columns % size == 0), None)
    return None if group is None or rows % 16 else int4_linear(linear, group)


def int8_linear(linear: torch.nn.Linear) -> torch.nn.Module:
    """The layer with codes of -127…127 and a scale a row."""
    import torch

    weight = linear.weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    return _module(linear, _int8_product, codes, scale.to(linear.weight.dtype))


def int4_linear(linear: torch.nn.Linear, group: int) -> torch.nn.Module:
    """The layer with codes of 0…15, and a scale and an offset a group of columns."""
    import torch

    rows, columns = linear.weight.shape
    weight = linear.weight.detach().float().view(rows, columns // group, group)
    low, high = weight.amin(-1), weight.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-12)
    codes = ((weight - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).view(rows, columns)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    # The kernel computes scale × (code - 8) + offset.
    settings = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().to(linear.weight.dtype)

    def product(x: torch.Tensor, packed: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, settings)
        return out

    return _module(linear, product, packed, settings)


def _int8_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    if len(x) < _MANY_ROWS:
        return torch._weight_int8pack_mm(x, codes, scale)
    return torch.nn.functional.linear(x, codes.to(x.dtype)) * scale


def _module(
    linear: torch.nn.Linear,
    product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    codes: torch.Tensor,
    scale: torch.Tensor,
) -> torch.nn.Module:
    import torch

    class PackedLinear(torch.nn.Module):
        """A linear layer over packed weights."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("codes", codes)
            self.register_buffer("scale", scale)
            self.bias = linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = product(x.reshape(-1, self.in_features), codes, scale)
            if self.bias is not None:
                out = out + self.bias
            return out.view(*x.shape[:-1], self.out_features)

    return PackedLinear()
