from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import pytest

from headrace.errors import ModelError
from headrace.models.download import RemoteFile, download
from models.hub_server import COMMIT, Hub, serving

DATA = bytes(range(256)) * 4096


def fetch(hub: Hub, folder: Path, *, sha256: str = hashlib.sha256(DATA).hexdigest(), size: int = len(DATA)) -> list[int]:
    seen: list[int] = []
    file = RemoteFile("a.bin", size, f"{hub.url}/OWNER/NAME/resolve/{COMMIT}/a.bin", sha256)
    with httpx.Client(follow_redirects=True) as client:
        download(client, file, folder / "a.bin", seen.append, pause=0.001)
    return seen


def test_a_file_arrives_whole_and_says_how_far_it_is(tmp_path: Path) -> None:
    with serving(Hub({"a.bin": DATA})) as hub:
        seen = fetch(hub, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert seen == sorted(seen)
    assert seen[-1] == len(DATA)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with serving(Hub({"a.bin": DATA}, cut_after=[300_000, 200_000, -1])) as hub:
        fetch(hub, tmp_path)
        asked = [range_ for _, range_ in hub.seen]
    assert (tmp_path / "a.bin").read_bytes() == DATA
    assert asked == ["", "bytes=300000-", "bytes=500000-"]


def test_what_an_earlier_process_left_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA[:1000])
    with serving(Hub({"a.bin": DATA})) as hub:
        fetch(hub, tmp_path)
        assert hub.seen[0][1] == "bytes=1000-"
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path: Path, ranges: bool) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"another file")
    (tmp_path / "a.bin.part.etag").write_text('"two"')
    with serving(Hub({"a.bin": DATA}, ranges=ranges)) as hub:
        fetch(hub, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_a_damaged_part_is_thrown_away_once(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    with serving(Hub({"a.bin": DATA})) as hub:
        fetch(hub, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_a_wrong_hash_is_never_landed(tmp_path: Path) -> None:
    with serving(Hub({"a.bin": DATA}, wrong={"a.bin"})) as hub, pytest.raises(ModelError, match="SHA-256"):
        fetch(hub, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_too_long_is_never_landed(tmp_path: Path) -> None:
    with serving(Hub({"a.bin": DATA})) as hub, pytest.raises(ModelError, match="longer"):
        fetch(hub, tmp_path, size=1000)
    assert not (tmp_path / "a.bin").exists()


def test_a_server_that_never_brings_anything_is_given_up_and_the_part_kept(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA[:1000])
    with serving(Hub({"a.bin": DATA}, cut_after=[0] * 99)) as hub, pytest.raises(ModelError, match="go on from there"):
        fetch(hub, tmp_path)
    assert (tmp_path / "a.bin.part").read_bytes() == DATA[:1000]


def test_busy_servers_are_asked_again(tmp_path: Path) -> None:
    with serving(Hub({"a.bin": DATA}, status={"a.bin": [503, 429, 500]})) as hub:
        fetch(hub, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize(("status", "words"), [(404, "404"), (403, "HF_TOKEN")])
def test_refusals_are_final(tmp_path: Path, status: int, words: str) -> None:
    with serving(Hub({"a.bin": DATA}, status={"a.bin": [status] * 9})) as hub:
        with pytest.raises(ModelError, match=words):
            fetch(hub, tmp_path)
        assert len(hub.seen) == 1
