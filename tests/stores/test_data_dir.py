from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from headrace.config import StoreSection
from headrace.errors import ConfigError
from headrace.stores.data_dir import database_url, load_pepper, prepare_data_dir


def test_starters_agree_on_a_pepper_that_is_theirs_alone(tmp_path: Path) -> None:
    folder = prepare_data_dir(StoreSection(data_dir=tmp_path / "a" / "b"))
    together = Barrier(8)

    def start(_: int) -> bytes:
        together.wait()
        return load_pepper(folder)

    before = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as pool:
            peppers = set(pool.map(start, range(8)))
    finally:
        os.umask(before)
    assert len(peppers) == 1
    assert len(peppers.pop()) == 32
    assert [path.name for path in folder.iterdir()] == ["pepper"]
    assert stat.S_IMODE((folder / "pepper").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_damaged_pepper_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "pepper").write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged"):
        load_pepper(tmp_path)
    assert (tmp_path / "pepper").read_bytes() == b"short"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="HEADRACE_DATA_DIR"):
        prepare_data_dir(StoreSection(data_dir=tmp_path / "file" / "data"))


def test_the_database_is_in_the_data_folder_unless_told(tmp_path: Path) -> None:
    assert database_url(StoreSection(data_dir=tmp_path)) == f"sqlite:///{tmp_path}/headrace.db"
    assert database_url(StoreSection(database_url="postgresql://h/d")) == "postgresql://h/d"
