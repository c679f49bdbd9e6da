"""What a folder's weights are, read from the headers of its safetensors files (https://github.com/huggingface/safetensors#format)."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec

from headrace.errors import ModelError
from headrace.types import StoredTensor

_LONGEST = 100 * 2**20


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of every *.safetensors file, without reading the weights. Raises `ModelError` for a damaged file."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(_LONGEST, path.stat().st_size):
                raise ModelError(f"{path} is damaged or cut short. Fetch it again.")
            try:
                header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
                header.pop("__metadata__", None)
                entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()}
            except msgspec.MsgspecError:
                raise ModelError(f"{path} is damaged. Fetch it again.") from None
        end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ModelError(f"{path} is damaged or cut short. Fetch it again.")
        found += [
            StoredTensor(name, entry.dtype, entry.shape, entry.data_offsets[1] - entry.data_offsets[0]) for name, entry in entries.items()
        ]
    return found
