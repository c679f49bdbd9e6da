from __future__ import annotations

from pathlib import Path

import pytest

from headrace.engine.kv_budget import block_count, free_memory, resident_memory
from headrace.errors import ModelError

MIB = 2**20


def blocks(**changes: int) -> int:
    return block_count(
        **{"block_bytes": MIB, "block_size": 32, "context_length": 1000, "max_sequences": 4, "free_bytes": 10_000 * MIB} | changes
    )


def test_no_more_than_the_batch_needs() -> None:
    assert blocks() == 4 * 32
    assert blocks(kv_bytes=10_000 * MIB) == 4 * 32


def test_no_more_than_a_share_of_free_memory() -> None:
    assert blocks(free_bytes=200 * MIB) == 80


def test_what_was_asked_for() -> None:
    assert blocks(kv_bytes=50 * MIB, free_bytes=0) == 50


def test_too_little_for_one_context_says_the_arithmetic() -> None:
    with pytest.raises(ModelError, match=r"1,000 tokens takes 32 KV blocks .* 32 MiB .* 40% of the 79 MiB .* 32 MiB.*kv_cache_gib"):
        blocks(free_bytes=79 * MIB)
    with pytest.raises(ModelError, match="kv_cache_gib gives 31 MiB"):
        blocks(kv_bytes=31 * MIB)


def machine(root: Path, groups: dict[str, dict[str, str]], membership: str) -> int:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:  1000000 kB\n")
    (root / "proc/self/cgroup").write_text(membership)
    for path, files in groups.items():
        (root / "cgroup" / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "cgroup" / path / name).write_text(text)
    return free_memory(root / "proc", root / "cgroup")


def test_without_control_groups(tmp_path: Path) -> None:
    assert machine(tmp_path, {}, "") == 1_024_000_000


def test_a_limit_leaves_what_is_not_used(tmp_path: Path) -> None:
    group = {"memory.max": "500000000\n", "memory.current": "300000000\n", "memory.stat": "anon 5\ninactive_file 100000000\n"}
    outer = {"memory.max": "max\n", "memory.current": "1\n"}
    assert machine(tmp_path, {"a": outer, "a/b": group}, "0::/a/b\n") == 300_000_000


def test_a_limit_further_up_counts(tmp_path: Path) -> None:
    inner = {"memory.max": "900000000", "memory.current": "0"}
    outer = {"memory.max": "400000000", "memory.current": "100000000"}
    assert machine(tmp_path, {"a": outer, "a/b": inner}, "0::/a/b\n") == 300_000_000


def test_in_a_container_the_group_is_at_the_root(tmp_path: Path) -> None:
    assert machine(tmp_path, {"": {"memory.max": "400000000", "memory.current": "0"}}, "0::/of/the/host\n") == 400_000_000


def test_version_1(tmp_path: Path) -> None:
    group = {"memory.limit_in_bytes": "500000000", "memory.usage_in_bytes": "100000000"}
    assert machine(tmp_path, {"memory/a": group}, "4:cpu,cpuacct:/a\n3:memory:/a\n") == 400_000_000


def test_this_machine() -> None:
    assert 0 < free_memory() < 2**50


def test_several_models_share_the_memory() -> None:
    def blocks(share: float, kv_bytes: int | None) -> int:
        return block_count(
            block_bytes=1024,
            block_size=32,
            context_length=320,
            max_sequences=10**6,
            kv_bytes=kv_bytes,
            free_bytes=10**8,
            memory_share=share,
        )

    assert blocks(0.5, None) == blocks(1.0, None) // 2
    assert blocks(0.5, 10**7) == blocks(1.0, 10**7) // 2


def test_room_for_a_standby_is_left() -> None:
    assert blocks(free_bytes=200 * MIB, kept_bytes=50 * MIB) == 60
    assert blocks(free_bytes=200 * MIB, kept_bytes=50 * MIB, kv_bytes=70 * MIB) == 70
    assert MIB < resident_memory() < 2**20 * MIB
