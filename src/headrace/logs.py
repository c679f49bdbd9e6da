"""What the server's processes say of themselves: one line an event, on standard error and, if wanted, in a file.

On a terminal lines are for people, elsewhere and in the file they are JSON. Several processes share the file. Loggers of
the standard library (uvicorn's, httpx's) come out the same way. Fields that could hold what users wrote, or keys,
never do: they are dropped by name, and tracebacks show no variables.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TextIO

import msgspec
import structlog

from headrace.config import LogSection
from headrace.errors import ConfigError

PRIVATE = frozenset({"prompt", "messages", "message_text", "text", "completion", "token", "api_key", "authorization", "headers", "body"})
"""Fields that are replaced, whoever set them."""

REQUEST_ID: ContextVar[str] = ContextVar("headrace_request_id", default="")
"""The request that the current task works for; every line that it logs says so."""

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_QUIET = {
    "uvicorn.error": logging.WARNING,
    "alembic": logging.WARNING,
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "asyncio": logging.WARNING,
}


def configure(section: LogSection, process: str, *, stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's loggers of this process, whose name is in every line.

    Raises `ConfigError` where there can be no such log file.
    """
    stream = sys.stderr if stream is None else stream
    level = _LEVELS[section.log_level]
    file = None
    if section.log_file is not None:
        try:
            file = RotatingFile(section.log_file.expanduser(), int(section.log_file_mib * 1024 * 1024), section.log_file_keep)
        except OSError as error:
            raise ConfigError(f"log_file: {section.log_file} can't be written: {error.strerror}.") from error
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _AddProcess(process),
            _add_request_id,
            hide_private,
            structlog.processors.format_exc_info,
            _Output(stream, file),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_Discard,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_IntoStructlog()]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        # uvicorn's own set-up, where somebody ran it in this process before.
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(max(level, quiet))


def watch(told: Callable[[MutableMapping[str, Any]], None]) -> None:
    """From now on `told` sees every line of this process before it is rendered, those of loggers that were made earlier, too."""

    def watching(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        told(event)
        return event

    processors: list[Any] = structlog.get_config()["processors"]
    processors.insert(processors.index(hide_private) + 1, watching)


def _add_request_id(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    request_id = REQUEST_ID.get()
    if request_id and "request_id" not in event:
        event["request_id"] = request_id
    return event


def hide_private(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor: no prompt and no key goes into a log."""
    for name in PRIVATE.intersection(event):
        event[name] = "[hidden]"
    return event


class RotatingFile:
    """A log file that several processes append to, rotated at `size` bytes into `file.1` … `file.keep`.

    A line is one append, which the kernel doesn't mix with others'. Only rotating takes a lock, and doesn't wait for it:
    whoever doesn't get it writes on into the file that is being renamed, so that a stopped process blocks no other.
    """

    def __init__(self, path: Path, size: int, keep: int) -> None:
        self._path = path
        self._size = size
        self._keep = keep
        self._fd = self._open()

    def write(self, line: bytes) -> None:
        """Append a line, which ends in a newline. A full disk loses the line, not the request."""
        with contextlib.suppress(OSError):
            self._follow()
            os.write(self._fd, line)

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _follow(self) -> None:
        """Be at the file that now has the name, and rotate it if it is full."""
        ours = os.fstat(self._fd)
        if not self._is_current(ours):
            self._change_to(self._open())
            ours = os.fstat(self._fd)
        if ours.st_size < self._size:
            return
        lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_current(ours):
                self._rotate()
                self._change_to(self._open())
        except BlockingIOError:
            pass
        finally:
            os.close(lock)

    def _change_to(self, fd: int) -> None:
        """Take the new file, which is open: a number that was closed before could be another's by the next line."""
        os.close(self._fd)
        self._fd = fd

    def _is_current(self, ours: os.stat_result) -> bool:
        try:
            named = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)

    def _rotate(self) -> None:
        if self._keep == 0:
            self._path.unlink()
            return
        for number in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self._path}.{number}").replace(f"{self._path}.{number + 1}")
        self._path.replace(f"{self._path}.1")


class _AddProcess:
    def __init__(self, process: str) -> None:
        self._process = process
        self._pid = os.getpid()

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = self._process
        event["pid"] = self._pid
        return event


class _Output:
    """The last processor: renders for each place, and writes."""

    def __init__(self, stream: TextIO, file: RotatingFile | None) -> None:
        self._stream = stream
        self._file = file
        self._encode = msgspec.json.Encoder(enc_hook=str).encode
        self._console = (
            structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ, exception_formatter=structlog.dev.plain_traceback)
            if stream.isatty()
            else None
        )

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        line = self._json(event) if self._console is None or self._file is not None else b""
        if self._file is not None:
            self._file.write(line)
        if self._console is None:
            shown = line.decode()
        else:
            shown = self._console(logger, method, dict(event)) + "\n"
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(shown)
            self._stream.flush()
        raise structlog.DropEvent

    def _json(self, event: MutableMapping[str, Any]) -> bytes:
        try:
            return self._encode(event) + b"\n"
        except (UnicodeEncodeError, msgspec.ValidationError, TypeError):
            return self._encode({name: ascii(value) for name, value in event.items()}) + b"\n"


class _Discard:
    """The logger at the end of the chain, to which nothing comes: the last processor has written."""

    def __init__(self, *args: Any) -> None:
        pass

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **kwargs: None


class _IntoStructlog(logging.Handler):
    """Standard library records as structlog events."""

    def emit(self, record: logging.LogRecord) -> None:
        name = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}.get(record.levelno, "error")
        fields: dict[str, Any] = {"logger": record.name}
        request_id = getattr(record, "request_id", None)  # from `extra`
        if request_id is not None:
            fields["request_id"] = request_id
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        getattr(structlog.get_logger(), name)(record.getMessage(), **fields)
