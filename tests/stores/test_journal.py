from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.records import UsageRow
from headrace.stores.journal import Journal, files, read, record
from headrace.stores.ledger_memory import MemoryLedger
from headrace.stores.replay import replay


def row(number: int) -> UsageRow:
    return UsageRow(id=f"r{number}", opened_at=1.5, tenant="t", model="m", completion_tokens=number, settled_at=2.0, status="ok")


@contextmanager
def a_full_disk(free: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: a write is cut short, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_was_appended_is_read_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([row(1), row(2)])
    journal.append([row(3)])
    first = journal.rotate()
    journal.append([row(4)])
    journal.close()
    assert len(first) == 1
    assert [list(read(path)) for path in files(tmp_path)] == [[row(1), row(2), row(3)], [row(4)]]
    assert first[0].stat().st_mode & 0o777 == 0o600


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_file_that_was_cut_anywhere_gives_its_whole_records(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = [row(number) for number in range(data.draw(st.integers(1, 5)))]
    whole = b"".join(map(record, rows))
    cut = data.draw(st.integers(0, len(whole)))
    noise = data.draw(st.binary(max_size=20))
    path = tmp_path_factory.mktemp("cut") / "1.log"
    path.write_bytes(whole[:cut] + noise)
    complete = sum(len(b"".join(map(record, rows[: number + 1]))) <= cut for number in range(len(rows)))
    found = list(read(path))
    assert found == rows[: len(found)]
    assert len(found) >= complete


def test_a_full_disk_leaves_nothing_of_the_group(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([row(1)])
    size = files(tmp_path)[0].stat().st_size
    with a_full_disk(size + 50), pytest.raises(OSError):
        journal.append([row(2), row(3)])
    journal.append([row(4)])
    assert [found for path in journal.rotate() for found in read(path)] == [row(1), row(4)]


@pytest.mark.anyio
async def test_replayed_rows_are_there_once(tmp_path: Path) -> None:
    ledger = MemoryLedger()
    journal = Journal(tmp_path)
    for number in range(1200):
        journal.append([row(number)]) if number % 400 == 0 else None
    journal.append([row(number) for number in range(1200)])
    paths = journal.rotate()
    kept = [path.read_bytes() for path in paths]
    await replay(ledger, paths)
    assert files(tmp_path) == []
    assert len(ledger.rows) == 1200
    for path, data in zip(paths, kept, strict=True):  # as if it had died before it removed them
        path.write_bytes(data)
    await replay(ledger, paths)
    assert len(ledger.rows) == 1200
