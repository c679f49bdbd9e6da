from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ModelError
from headrace.models.address import Repository, parse
from headrace.models.cache import Cache, safe_name, safe_path

NASTY = [
    "../x",
    "..",
    "/etc/passwd",
    "a/../../b",
    "C:\\x",
    "C:x",
    "a\\b",
    "a\0b",
    "%2e%2e/x",
    ".ssh",
    "a/.git/x",
    "",
    "a//b",
    "a/",
    "x" * 5000,
    "con\n",
]
hostile = st.one_of(
    st.sampled_from(NASTY), st.text(max_size=300), st.lists(st.sampled_from(["..", ".", "a", "", "%2e%2e", "\\"])).map("/".join)
)


@given(hostile, hostile)
def test_folder_names_hold_nothing_that_leads_elsewhere(name: str, key: str) -> None:
    made = safe_name(name, key)
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,96}", made)
    assert ".." not in made.split("/")
    assert safe_name(name, key + "x") != made


@given(hostile)
def test_file_names_stay_below_their_folder_or_are_refused(name: str) -> None:
    try:
        path = safe_path(name)
    except ModelError:
        return
    root = Path("/cache/files")
    assert (root / path).resolve().is_relative_to(root)
    assert not path.is_absolute()
    assert not set(name) & set("\0\\:%")
    assert all(not part.startswith(".") for part in path.parts)


@pytest.mark.parametrize("name", NASTY)
def test_known_ways_out_are_refused(name: str) -> None:
    with pytest.raises(ModelError):
        safe_path(name)


@given(hostile, st.sampled_from(["hf:{}", "ms:{}", "{}", "hf:OWNER/{}", "hf:OWNER/NAME@{}", "hf:OWNER/NAME:{}"]))
def test_addresses_hold_nothing_that_leads_elsewhere(part: str, form: str) -> None:
    try:
        address = parse(form.format(part), "huggingface")
    except ModelError:
        return
    if isinstance(address, Repository):
        for piece in (address.id, address.revision or "", address.select or ""):
            assert re.fullmatch(r"[A-Za-z0-9._/-]*", piece)
            assert ".." not in piece
            assert not piece.startswith("/")


def test_a_landing_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.landing(cache.model("m")) as work:
        (work / "a").write_text("first")
    with pytest.raises(IsADirectoryError), cache.landing(cache.model("m")) as work:
        work.write_text("fails")
    assert (cache.model("m") / "a").read_text() == "first"
    with cache.landing(cache.model("m")) as work:
        (work / "b").write_text("third")
    assert [path.name for path in cache.model("m").iterdir()] == ["b"]
    assert list((tmp_path / "work").iterdir()) == []


def test_the_second_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()
    leave = threading.Event()

    def first() -> None:
        with Cache(tmp_path).lock("m"):
            inside.set()
            leave.wait(10)
            order.append("first")

    def second() -> None:
        with Cache(tmp_path).lock("m"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    cache, file = Cache(tmp_path / "cache"), tmp_path / "f"
    file.write_bytes(b"one")
    before = cache.hash_of(file)
    assert cache.hash_of(file) == before
    file.write_bytes(b"two!")
    assert cache.hash_of(file) != before


def test_a_full_disk_is_said_before(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="HEADRACE_CACHE"):
        Cache(tmp_path).need_space(2**60, "Downloading m")
