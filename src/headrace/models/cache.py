"""The cache folder: names that can't escape it, locks, atomic landing, disk space, hashes.

models/<name>-<key>/     model folders ready to serve, each landed whole by one rename
files/<name>-<key>/      files as they were downloaded, landed one by one after their check
partial/                 downloads under way; kept, so that the next try resumes
work/                    conversions under way; cleared when nobody holds their lock
locks/                   one lock file a model
hashes/                  SHA-256 of local files, by path, size and time
convert/                 the environment that converts Transformers folders
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from headrace.errors import ModelError
from headrace.models.progress import log

_UNSAFE = re.compile(r"[^a-z0-9._-]+")
_SEGMENT = re.compile(r"[A-Za-z0-9_+()\[\]@=,-][A-Za-z0-9 ._+()\[\]@=,-]{0,199}")


def safe_name(name: str, key: str) -> str:
    """A folder name for a model: what can be read of its name, and a hash of what identifies it.

    It holds only a-z, 0-9, dot, dash and underscore, begins with a letter or digit, and is at most 97 characters long,
    whatever comes in.
    """
    shown = _UNSAFE.sub("-", name.lower()).strip("-._")[:80].rstrip("-._") or "model"
    return f"{shown}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def safe_path(name: str) -> Path:
    """A file's path in a repository as a relative path below a folder of ours.

    Raises `ModelError` for anything that could lead elsewhere or means something to some file system.
    """
    segments = name.split("/")
    if len(name) > 400 or any(not _SEGMENT.fullmatch(part) or ".." in part or part.endswith((" ", ".")) for part in segments):
        shown = name if len(name) <= 80 else name[:80] + "…"
        raise ModelError(f"The file name {shown!r} isn't safe to write to disk. Take the model from another place.")
    return Path(*segments)


class Cache:
    """The folder given by `cache_dir`. Folders are made when something is first written."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def model(self, name: str) -> Path:
        return self.root / "models" / name

    def files(self, name: str) -> Path:
        return self.root / "files" / name

    def partial(self, name: str) -> Path:
        return self.root / "partial" / name

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by the one process that pulls or converts `name`; others wait here, and then find it done."""
        folder = self._make(self.root / "locks")
        lock = FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("Another process is fetching or converting this model; waiting for it.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def landing(self, destination: Path) -> Iterator[Path]:
        """An empty folder to fill; at the end it becomes `destination` by one rename. Call it under the model's lock.

        An earlier `destination` is replaced. After an exception nothing is left.
        """
        work = self.work(destination.name)
        try:
            yield work
            _sync(work)
            self._make(destination.parent)
            if destination.exists():
                old = work.with_name(work.name + ".old")
                shutil.rmtree(old, ignore_errors=True)
                destination.rename(old)
                work.rename(destination)
                shutil.rmtree(old, ignore_errors=True)
            else:
                work.rename(destination)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def work(self, name: str) -> Path:
        """An empty folder; what a crash left in it is gone. Call it under the lock of that name."""
        work = self.root / "work" / name
        shutil.rmtree(work, ignore_errors=True)
        return self._make(work)

    def clear_partial(self, name: str) -> None:
        shutil.rmtree(self.partial(name), ignore_errors=True)

    def need_space(self, size: int, what: str) -> None:
        """Raises `ModelError` unless `size` bytes, and a little more, fit on the cache folder's disk."""
        free = shutil.disk_usage(self._make(self.root)).free
        if free < size + 64 * 2**20:
            raise ModelError(
                f"{what} needs {size / 1e6:.0f} MB, but the disk of {self.root} has {free / 1e6:.0f} MB free. "
                "Free some space, or set HEADRACE_CACHE to a folder on another disk."
            )

    def hash_of(self, path: Path) -> str:
        """SHA-256 of a local file; remembered by its path, size, inode and time of change."""
        path = path.resolve()
        stat = path.stat()
        memory = self.root / "hashes" / safe_name("file", f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}")
        if memory.is_file():
            known = memory.read_text()
            if re.fullmatch(r"[0-9a-f]{64}", known):
                return known
        found = sha256(path)
        self._make(memory.parent)
        unique = memory.with_name(f"{memory.name}.{os.getpid()}")
        unique.write_text(found)
        unique.replace(memory)
        return found

    def _make(self, folder: Path) -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"The cache folder {folder} can't be made ({error.strerror}). Set HEADRACE_CACHE to a folder you may write to."
            ) from None
        return folder


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _sync(folder: Path) -> None:
    """To the disk before the rename: after a power cut a landed folder is whole or not there."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
