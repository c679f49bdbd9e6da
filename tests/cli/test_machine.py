from __future__ import annotations

from pathlib import Path

import pytest

from headrace.cli import machine

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemFree: {2 * 2**20} kB\nMemAvailable: {10 * 2**20} kB\n")
    put(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    return tmp_path


def put(root: Path, path: str, text: object) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


def test_memory_without_limits(root: Path) -> None:
    put(root, "sys/fs/cgroup/a/b/memory.max", "max")
    assert machine.memory(root) == machine.Memory(total=16 * GIB, available=10 * GIB)


def test_the_tightest_group_around_us_counts_and_file_pages_are_free(root: Path) -> None:
    put(root, "sys/fs/cgroup/a/b/memory.max", 8 * GIB)
    put(root, "sys/fs/cgroup/a/b/memory.current", 1 * GIB)
    put(root, "sys/fs/cgroup/a/memory.max", 4 * GIB)
    put(root, "sys/fs/cgroup/a/memory.current", 3 * GIB)
    put(root, "sys/fs/cgroup/a/memory.stat", f"anon {GIB}\ninactive_file {2 * GIB}")
    assert machine.memory(root) == machine.Memory(total=16 * GIB, available=3 * GIB, limit=4 * GIB)


def test_the_first_version_of_control_groups(root: Path) -> None:
    put(root, "proc/self/cgroup", "5:memory:/x\n3:cpu,cpuacct:/x\n")
    put(root, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", 2 * GIB)
    put(root, "sys/fs/cgroup/memory/x/memory.usage_in_bytes", 3 * GIB)
    put(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", 2**63 - 4096)
    put(root, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", 50_000)
    put(root, "sys/fs/cgroup/cpu/x/cpu.cfs_period_us", 100_000)
    assert machine.memory(root) == machine.Memory(total=16 * GIB, available=0, limit=2 * GIB)
    assert machine.cores(root) == 0.5


def test_cores_under_a_quota(root: Path) -> None:
    free = machine.cores(root)
    assert free >= 1
    put(root, "sys/fs/cgroup/a/b/cpu.max", "max 100000")
    assert machine.cores(root) == free
    put(root, "sys/fs/cgroup/a/cpu.max", "75000 100000")
    assert machine.cores(root) == 0.75


def test_another_system(tmp_path: Path) -> None:
    assert machine.memory(tmp_path) is None
    assert machine.features(tmp_path) == frozenset()
    assert machine.processor(tmp_path) == ""
    assert machine.cores(tmp_path) >= 1


def test_features(root: Path) -> None:
    put(root, "proc/cpuinfo", "model name\t: A Processor\nflags\t\t: fpu avx2 amx_tile\n")
    assert machine.features(root) == {"fpu", "avx2", "amx_tile"}
    assert machine.processor(root) == "A Processor"
