"""How many KV blocks the engine gets: enough for its batch, and no more than the machine can spare."""

from __future__ import annotations

from pathlib import Path

from headrace.errors import ModelError

SHARE = 0.4
"""Of the memory that is free once the weights are loaded, the part that keys and values may take by default."""

_MIB = 1024 * 1024
_NO_LIMIT = 1 << 60


def block_count(
    *,
    block_bytes: int,
    block_size: int,
    context_length: int,
    max_sequences: int,
    kv_bytes: int | None = None,
    free_bytes: int | None = None,
    memory_share: float = 1.0,
    kept_bytes: int = 0,
    share: float = SHARE,
) -> int:
    """Blocks to allocate, each of `block_size` tokens and `block_bytes` bytes over all layers.

    `memory_share` of the memory is for this model, where several are served; `kept_bytes` of what is free are left to others.
    With `kv_bytes` as many as fit in it; without, `share` of the free memory (`free_bytes`, by default what
    `free_memory` finds). Never more than `max_sequences` full contexts need. Raises `ModelError` where not even one
    full context fits.
    """
    one = -(-context_length // block_size)
    if kv_bytes is not None:
        budget = int(kv_bytes * memory_share)
        source = f"kv_cache_gib gives {budget / _MIB:,.0f} MiB" + (" to this model" if memory_share < 1 else "")
        remedy = "raise kv_cache_gib or lower the context (--context)"
    else:
        free = max(0, (free_memory() if free_bytes is None else free_bytes) - kept_bytes)
        share *= memory_share
        budget = int(free * share)
        source = f"{share:.0%} of the {free / _MIB:,.0f} MiB that are free are {budget / _MIB:,.0f} MiB"
        remedy = "free memory, lower the context (--context), or set kv_cache_gib if you know better"
    count = min(budget // block_bytes, one * max_sequences)
    if count < one:
        raise ModelError(
            f"A context of {context_length:,} tokens takes {one:,} KV blocks of {block_bytes / 1024:,.0f} KiB, "
            f"{one * block_bytes / _MIB:,.0f} MiB in all, but {source}: {remedy}."
        )
    return count


def resident_memory(proc: Path = Path("/proc")) -> int:
    """Bytes that this process has in memory; 0 where the system doesn't say."""
    import os

    try:
        return int((proc / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: the machine's, or its control group's where that leaves less."""
    return min(_available(proc / "meminfo"), _cgroup_free(proc / "self/cgroup", cgroups))


def _available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return _physical()


def _physical() -> int:
    """Half of the memory that is built in, where the system doesn't say how much is available (not Linux)."""
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 4 * 1024 * _MIB


def _cgroup_free(membership: Path, cgroups: Path) -> int:
    """What is left under the tightest limit of the process's control group and those above it; both cgroup versions."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    left = _NO_LIMIT
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            left = min(left, _tightest(cgroups, path, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left = min(left, _tightest(cgroups / "memory", path, *names))
    return left


def _tightest(root: Path, path: str, limit_name: str, usage_name: str, inactive: str) -> int:
    # In a container the path may be the host's, and the group itself be mounted at the root: walking up meets both.
    group = root / path.strip("/")
    left = _NO_LIMIT
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None and limit < _NO_LIMIT:
            # File pages that nobody uses are counted as use, but are given up for the asking.
            left = min(left, max(0, limit - usage + _stat(folder / "memory.stat", inactive)))
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _stat(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
