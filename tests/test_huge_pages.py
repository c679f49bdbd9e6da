"""A heap in huge pages."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from headrace import huge_pages
from headrace.huge_pages import SIZE, gather

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as Linux has them")


def in_huge_pages() -> int:
    """Bytes of this process."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("AnonHugePages:"))


def test_what_is_in_use_goes_into_them_and_stays_what_it_was() -> None:
    before, content = in_huge_pages(), os.urandom(8 * SIZE)
    memory = mmap.mmap(-1, 8 * SIZE, flags=mmap.MAP_PRIVATE)
    memory[:] = content
    gathered = gather()
    if gathered == 0:
        pytest.skip("this system gives none")
    assert in_huge_pages() - before >= 7 * SIZE
    assert memory[:] == content


def test_who_wants_none_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "enabled"
    said.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_ENABLED", said)
    assert gather() == 0
    monkeypatch.setattr(huge_pages, "_ENABLED", tmp_path / "a system without")
    assert gather() == 0


def test_memory_that_is_hardly_used_stays_as_it_is() -> None:
    listed = """\
{busy:x}-{busy_end:x} rw-p 00000000 00:00 0
Size:  10240 kB
Rss:    9000 kB
{idle:x}-{idle_end:x} rw-p 00000000 00:00 0 [heap]
Size:   8192 kB
Rss:     300 kB
{file:x}-{file_end:x} rw-p 00000000 fe:00 77 /usr/lib/some library.so
Size:   8192 kB
Rss:    8192 kB
{code:x}-{code_end:x} r-xp 00000000 00:00 0
Rss:    8192 kB
"""
    places = {"busy": 3 * SIZE - 4096, "idle": 100 * SIZE, "file": 200 * SIZE, "code": 300 * SIZE}
    sizes = {"busy": 5 * SIZE, "idle": 4 * SIZE, "file": 4 * SIZE, "code": 4 * SIZE}
    text = listed.format(**places, **{f"{name}_end": place + sizes[name] for name, place in places.items()})
    # What isn't a whole huge page at either end is left out.
    assert huge_pages._heap(text) == [(3 * SIZE, 7 * SIZE)]
