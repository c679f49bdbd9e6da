"""Downloads one file: resumes what an earlier try left, checks size and hash, and only then gives it its name."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import ModelError
from headrace.models.cache import sha256
from headrace.models.progress import Advance, log

if TYPE_CHECKING:
    import httpx

TIMEOUT = (20.0, 30.0, 30.0, 30.0)
"""Seconds to connect, read, write and wait for a connection."""
_TRIES = 5
_FIRST_PAUSE = 0.5


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a hub. Without `sha256` its `git_blob` (SHA-1 as git counts it) is checked, without both its size alone."""

    path: str
    size: int
    url: str
    sha256: str = ""
    git_blob: str = ""


class _Again(Exception):
    """The transfer broke off; another try may go on from there."""


def download(client: httpx.Client, file: RemoteFile, destination: Path, advance: Advance, *, pause: float = _FIRST_PAUSE) -> None:
    """Afterwards `destination` is there, whole and checked. What an interrupted download got stays beside it, for the next.

    Tries again with growing pauses (first `pause` seconds) as long as the transfer breaks off without bringing anything.
    Raises `ModelError`.
    """
    import httpx

    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    fruitless = 0
    restarted = False
    while True:
        had = part.stat().st_size if part.is_file() else 0
        try:
            if had < file.size or file.size == 0:
                _transfer(client, file, part, advance)
        except (_Again, httpx.TransportError) as error:
            fruitless = fruitless + 1 if (part.stat().st_size if part.is_file() else 0) <= had else 0
            if fruitless >= _TRIES:
                raise ModelError(
                    f"Downloading {file.path} broke off {_TRIES} times in a row ({error or type(error).__name__}). "
                    "What was fetched is kept; try again to go on from there."
                ) from None
            log.info("Downloading %s broke off (%s); trying again.", file.path, error or type(error).__name__)
            time.sleep(pause * 2**fruitless)
            continue
        wrong = _difference(file, part)
        if not wrong:
            part.replace(destination)
            _etag_of(part).unlink(missing_ok=True)
            return
        part.unlink(missing_ok=True)
        _etag_of(part).unlink(missing_ok=True)
        if had == 0 or restarted:
            raise ModelError(f"{file.path} {wrong}; it isn't used. Try again, or from another mirror.")
        # The part that an earlier try left may be what was wrong.
        restarted = True


def _transfer(client: httpx.Client, file: RemoteFile, part: Path, advance: Advance) -> None:
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        etag = _etag_of(part).read_text() if _etag_of(part).is_file() else ""
        if etag:
            headers["If-Range"] = etag
    with client.stream("GET", file.url, headers=headers) as response:
        if response.status_code == 416:
            part.unlink(missing_ok=True)
            raise _Again("the server can't continue where the download stopped")
        _check_status(response, file)
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 206 and not resumed:
            part.unlink(missing_ok=True)
            raise _Again("the server sent another range than was asked for")
        etag = response.headers.get("ETag", "")
        # Only a strong validator vouches for the same bytes.
        if etag.startswith('"') and len(etag) < 512:
            _etag_of(part).write_text(etag)
        else:
            _etag_of(part).unlink(missing_ok=True)
        done = have if resumed else 0
        with part.open("ab" if resumed else "wb") as target:
            for chunk in response.iter_bytes():
                done += len(chunk)
                if done > file.size:
                    break
                target.write(chunk)
                advance(done)
    if done < file.size:
        raise _Again(f"the connection ended at byte {done} of {file.size}")
    if done > file.size:
        part.write_bytes(b"")
        raise ModelError(f"{file.path} is longer than the {file.size} bytes that the hub lists; it isn't used.")


def _check_status(response: httpx.Response, file: RemoteFile) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in (401, 403):
        raise ModelError(
            f"{file.path}: the hub answered {status}. The model may be private or its licence not accepted yet: "
            "accept it on the hub's page, and set HF_TOKEN (or MODELSCOPE_API_TOKEN)."
        )
    if status == 429 or status >= 500:
        raise _Again(f"the server answered {status}")
    raise ModelError(f"{file.path} can't be downloaded: the server answered {status}.")


def _difference(file: RemoteFile, part: Path) -> str:
    """What is wrong with the downloaded file; empty if nothing."""
    size = part.stat().st_size if part.is_file() else 0
    if size != file.size:
        return f"has {size} bytes, where {file.size} were expected"
    if file.sha256:
        found = sha256(part)
        return "" if found == file.sha256.lower() else f"has the SHA-256 {found}, where {file.sha256} was expected"
    if file.git_blob:
        # git's own identity of the content, not a protection: the listing vouches for it.
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        digest.update(part.read_bytes())
        found = digest.hexdigest()
        return "" if found == file.git_blob.lower() else f"has the git hash {found}, where {file.git_blob} was expected"
    return ""


def _etag_of(part: Path) -> Path:
    return part.with_name(part.name + ".etag")
