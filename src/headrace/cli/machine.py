"""What this machine has: cores, memory and processor features, as containers limit them.

Everything is read from files below `root`, which tests replace. What can't be read is None or empty: this is
Linux's layout, and other systems go without.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from headrace.engine.processor import features as processor_features


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    total: int
    available: int
    limit: int | None = None
    """A container's or service's limit, where there is one below the total."""


def memory(root: Path = Path("/")) -> Memory | None:
    """Memory that this process could still get, under the limits of all control groups it is in."""
    said = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)}
    if "MemTotal" not in said:
        return None
    total = said["MemTotal"]
    available = said.get("MemAvailable", said.get("MemFree", 0))
    limit: int | None = None
    for group in _groups(root, "memory"):
        bound = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if bound is None or bound >= total:
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        # The kernel takes file pages back before it refuses memory.
        files = re.search(r"^(?:total_)?inactive_file (\d+)", _text(group / "memory.stat"), re.MULTILINE)
        free = bound - max(0, used - int(files[1]) if files else used)
        limit = min(bound, limit or bound)
        available = min(available, max(0, free))
    return Memory(total=total, available=available, limit=limit)


def cores(root: Path = Path("/")) -> float:
    """Cores this process may use: its affinity, under a control group's quota; 1.5 where the quota says so."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split()
        quota, period = words if len(words) == 2 else (_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))
        if quota.strip().isdigit() and period.strip().isdigit() and int(period):
            count = min(count, int(quota) / int(period))
    return count


def features(root: Path = Path("/")) -> frozenset[str]:
    """The processor's feature flags, in Linux's words: `avx2`, `avx512_bf16`, `amx_tile`, …"""
    return processor_features(root)


def processor(root: Path = Path("/")) -> str:
    """The processor's name as the kernel says it; empty where it doesn't."""
    found = re.search(r"^model name\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else ""


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of those around it, version 2 or 1."""
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            base = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = Path(path.lstrip("/"))
        folders += [base / part for part in (inner, *inner.parents)]
    return folders


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
