"""What this machine's processor computes with, as the kernel tells it."""

from __future__ import annotations

import re
from pathlib import Path

_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_PACKED = 1.1875
"""Bytes an element of keys and values takes in 8-bit blocks of 32 tokens, scales included: the mean of 40/32 and 72/64."""


def features(root: Path = Path("/")) -> frozenset[str]:
    """The processor's feature flags, in Linux's words: `avx2`, `avx512_bf16`, `amx_tile`, …; none where they can't be read."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", (root / "proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()


def multiplies_bf16(flags: frozenset[str]) -> bool:
    """Whether it multiplies bfloat16, rather than unpacking it."""
    return bool(flags & _BF16)


def kv_element_bytes(flags: frozenset[str], *, deterministic: bool = False) -> float:
    """What OpenVINO's keys and values take an element, by the rule of `openvino_runner`: bf16 where attention computes in it."""
    return 4.0 if deterministic else 2.0 if multiplies_bf16(flags) else _PACKED
