"""Gives a converted model the weights of its GGUF file.

OpenVINO GenAI's conversion keeps a block's scale but rounds its offset to a whole step, which for Q4_1 and Q4_K is far
off: the default model's perplexity rises from 15.3 to 18.0. A block is `d q + m` with q in 0…15. As 8-bit codes it is
`(d/16) (16 q - z)` with `z = round(-16 m/d)`: scales and codes are exact, and the offset is off by `d/32` at most.

The conversion's Q4_0, Q8_0 and F16 are exact already; Q6_K's scales are rounded to float16, a 64th of a step.

Run as a program, `python -m headrace.models.gguf_weights FILE FOLDER`, so that what it allocates is given back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.models.gguf_metadata import read_metadata

if TYPE_CHECKING:
    import openvino

BLOCK = 32
FINER = 16
"""Steps of the new codes in one of the old."""


class Blocks(NamedTuple):
    """A matrix of N rows, each of B blocks of 32 weights `scale * code + offset`."""

    scale: NDArray[np.float32]
    """[N, B]"""
    offset: NDArray[np.float32]
    """[N, B]"""
    codes: NDArray[np.uint8]
    """[N, B, 32], 0 to 15"""


def read_q4_1(data: NDArray[np.uint8], rows: int) -> Blocks:
    """The blocks of a Q4_1 tensor's bytes: 2 of scale, 2 of offset (float16), 16 of codes. Source: ggml's `block_q4_1`."""
    blocks = np.ascontiguousarray(data).reshape(rows, -1, 20)
    head = blocks[..., :4].copy().view(np.float16).astype(np.float32)
    packed = blocks[..., 4:]
    return Blocks(head[..., 0], head[..., 1], np.concatenate([packed & 15, packed >> 4], axis=-1))


def read_q4_k(data: NDArray[np.uint8], rows: int) -> Blocks:
    """The blocks of a Q4_K tensor's bytes, eight in a superblock: two float16 that multiply scales and offsets, 12 bytes of
    these in 6 bits each, 128 of codes. Source: ggml's `block_q4_K` and `get_scale_min_k4`."""
    blocks = np.ascontiguousarray(data).reshape(rows, -1, 144)
    head = blocks[..., :4].copy().view(np.float16).astype(np.float32)
    first, second, third = (blocks[..., start : start + 4] for start in (4, 8, 12))
    scale = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    offset = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    packed = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, BLOCK)
    codes = np.concatenate([packed & 15, packed >> 4], axis=-2)
    return Blocks((head[..., :1] * scale).reshape(rows, -1), (-head[..., 1:] * offset).reshape(rows, -1), codes.reshape(rows, -1, BLOCK))


def finer(blocks: Blocks) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float16]]:
    """8-bit codes [N, B, 32], zero points [N, B, 1] and scales [N, B, 1], so that a weight is `scale (code - zero point)`.

    A block that lies off zero, so that no zero point in 0…255 reaches its offset, gets a coarser scale: the codes span it and zero.
    """
    offset = blocks.offset
    ends = np.stack([np.zeros_like(offset), offset, offset + 15 * blocks.scale])
    low, high = ends.min(axis=0), ends.max(axis=0)
    scale = np.maximum(np.abs(blocks.scale) / FINER, (high - low) / 254).astype(np.float16)
    # By the scale as float16 has it: below 6e-5 that is inexact.
    step = np.where(scale == 0, 1, scale).astype(np.float32)
    zero_points = np.clip(np.round(-low / step), 0, 255).astype(np.uint8)
    codes = blocks.codes * (blocks.scale / step)[..., None]
    codes += ((offset - low) / step)[..., None]
    return np.clip(np.round(codes, out=codes), 0, 255).astype(np.uint8), zero_points[..., None], scale[..., None]


def repair(path: Path, folder: Path) -> list[str]:
    """Rewrite `folder`'s OpenVINO model with the weights of the GGUF file `path`.

    Returns the names of matrices that were not found again in the model and stay as the conversion made them.
    """
    import openvino as ov

    metadata = read_metadata(path)
    architecture = metadata["general.architecture"]
    heads = {int(metadata.get(f"{architecture}.attention.{name}", 0)) for name in ("head_count", "head_count_kv")} - {0}
    model = ov.Core().read_model(folder / "openvino_model.xml")
    compressed = _compressed(model)
    changed, missed = 0, []
    for name, read in _offset_tensors(path):
        for blocks in _arrangements(read, name, heads):
            found = compressed.get(_mark(blocks.scale))
            if found:
                _replace(found.pop(), blocks)
                changed += 1
                break
        else:
            missed.append(name)
    if changed:
        model.validate_nodes_and_infer_types()
        exact = folder / "exact"
        exact.mkdir()
        ov.save_model(model, exact / "openvino_model.xml", compress_to_fp16=False)
        del model, compressed
        for file in exact.iterdir():
            file.replace(folder / file.name)
        exact.rmdir()
    return missed


def _offset_tensors(path: Path) -> Iterator[tuple[str, Blocks]]:
    """Matrices whose blocks have offsets, which the conversion rounds."""
    from gguf import GGMLQuantizationType, GGUFReader

    readers = {GGMLQuantizationType.Q4_1: read_q4_1, GGMLQuantizationType.Q4_K: read_q4_k}
    for tensor in GGUFReader(path).tensors:
        if tensor.tensor_type in readers and len(tensor.shape) == 2:
            yield tensor.name, readers[tensor.tensor_type](tensor.data, int(tensor.shape[1]))


def _arrangements(blocks: Blocks, name: str, heads: set[int]) -> Iterator[Blocks]:
    """The rows as they lie in the file, and as rotary embeddings want them: llama.cpp interleaves the halves of each head."""
    yield blocks
    if ".attn_q." in name or ".attn_k." in name:
        for count in sorted(heads, reverse=True):
            if len(blocks.scale) % (2 * count) == 0:
                yield Blocks(*(_apart(array, count) for array in blocks))


def _apart(array: NDArray[Any], heads: int) -> NDArray[Any]:
    rows = array.shape[0]
    return array.reshape(heads, rows // heads // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _mark(scale: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    """What a matrix is recognised by: the conversion keeps the scales bit by bit."""
    return scale.shape, scale.astype(np.float16).tobytes()


def _compressed(model: openvino.Model) -> dict[tuple[tuple[int, ...], bytes], list[Any]]:
    """The multiplications `(u4 codes - zero point) scale`, by their scales."""
    found: dict[tuple[tuple[int, ...], bytes], list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply" or node.input_value(0).get_node().get_type_name() != "Subtract":
            continue
        scale = node.input_value(1).get_node()
        codes = node.input_value(0).get_node().input_value(0).get_node()
        while codes.get_type_name() == "Convert":
            codes = codes.input_value(0).get_node()
        if scale.get_type_name() == "Constant" and codes.get_type_name() == "Constant" and codes.get_element_type().get_type_name() == "u4":
            values = np.asarray(scale.data)
            if values.ndim == 3 and values.shape[2] == 1:
                found.setdefault(_mark(values[..., 0]), []).append(node)
    return found


def _replace(product: Any, blocks: Blocks) -> None:
    import openvino.opset15 as op

    codes, zero_points, scale = finer(blocks)
    weights = op.subtract(op.convert(op.constant(codes), "f16"), op.convert(op.constant(zero_points), "f16"))
    exact = op.multiply(weights, op.constant(scale))
    for target in list(product.output(0).get_target_inputs()):
        target.replace_source_output(exact.output(0))


if __name__ == "__main__":
    print(" ".join(repair(Path(sys.argv[1]), Path(sys.argv[2]))))  # noqa: T201  the parent reads it
