"""Pages of a mapped file that a process lets go of."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from headrace.engine.mapped_file import let_go

SIZE = 8 << 20


def resident(path: Path) -> int:
    """KiB of the file in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    places = [number for number, line in enumerate(lines) if line.endswith(str(path))]
    return sum(int(next(line for line in lines[number:] if line.startswith("Rss:")).split()[1]) for number in places)


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux shows it")
def test_pages_go_and_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "weights of a model.bin"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        before = mapped[:]
        assert resident(path) >= SIZE // 1024
        assert let_go(path) == SIZE
        assert resident(path) == 0
        assert mapped[:] == before


def test_what_can_be_written_to_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "weights.bin"
    path.write_bytes(b"\0" * SIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        mapped[:5] = b"words"
        assert let_go(path) == 0
        assert mapped[:5] == b"words"
    assert let_go(tmp_path / "nowhere") == 0
