"""Error tracking: errors that are alike have one fingerprint, and are counted.

A fingerprint is made of the process, the route, the model, the error's code and class, and the innermost frames of our own code; never
of a message, which could repeat what a user wrote. Each process counts for itself and hands on what it counted, at once for an error
that is the first for a while; the supervisor keeps the book (`stores.error_writer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from hashlib import sha256
from types import TracebackType
from typing import Any

import msgspec

from headrace import __version__
from headrace.records import TrackedError

FRAMES = 4
"""Most frames of our own code that tell where an error was raised."""
INTERVAL = 0.5
"""Seconds between batches of one process."""
MOST = 1000
"""Fingerprints that are kept, in a process and in the book."""
DETAIL_LENGTH = 200

_OURS = "headrace"
_QUOTED = re.compile(r"""(?<!\w)['"`«](?:.*['"`»](?!\w)|.*)""")
"""From the first quotation mark to the last one: what is quoted may hold quotation marks, too."""
_VARYING = re.compile(r"\d+\.\d+|(?<![0-9A-Za-z])(?=[0-9a-f]*\d)[0-9a-f]{8,}(?![0-9A-Za-z])|\d{4,}")
_VALUE = re.compile(r"""[(<'":{=[\n]""")
_REASONS = ("why", "reason")
"""Fields of log lines that hold our own words."""


def steady(text: str) -> str:
    """What is the same each time that a message of ours is made: without what it quotes, long numbers and ids."""
    return _VARYING.sub("…", _QUOTED.sub("…", text.partition("\n")[0]))[:DETAIL_LENGTH].encode("utf-8", "replace").decode()


def frames_of(error: BaseException) -> tuple[str, ...]:
    """The innermost frames of our own code, innermost last: `headrace.module:Class.method:line`."""
    found: list[str] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        if name == _OURS or name.startswith(_OURS + "."):
            found.append(f"{name}:{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}")
        trace = trace.tb_next
    return tuple(found[-FRAMES:])


def kind_of(error: BaseException) -> str:
    """The classes of an error and of what caused it."""
    names = [type(error).__name__]
    cause = error.__cause__
    while cause is not None and len(names) < 3:
        names.append(type(cause).__name__)
        cause = cause.__cause__
    return " from ".join(names)


def tracked(
    process: str,
    code: str,
    error: BaseException | None = None,
    *,
    route: str = "",
    model: str = "",
    detail: str = "",
    request_id: str = "",
    at: float | None = None,
) -> TrackedError:
    """One error, seen once. `detail` tells errors apart only where there is no exception, and is written in our own words."""
    frames = frames_of(error) if error is not None else ()
    kind = kind_of(error) if error is not None else ""
    places = [frame.rpartition(":")[0] for frame in frames]  # lines change with each version
    parts = [process, route, model, code, kind, *(places if error is not None else [detail])]
    now = time.time() if at is None else at
    return TrackedError(
        fingerprint=sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()[:16],
        process=process,
        code=code,
        kind=kind,
        route=route,
        model=model,
        frames=frames,
        detail=detail,
        first_seen=now,
        last_seen=now,
        request_id=request_id,
        version=__version__,
    )


def added(one: TrackedError, other: TrackedError) -> TrackedError:
    """Both counts under one fingerprint; what else there is comes from the one that was seen last."""
    older, newer = (one, other) if one.last_seen <= other.last_seen else (other, one)
    return msgspec.structs.replace(
        newer,
        count=one.count + other.count,
        first_seen=min(one.first_seen, other.first_seen),
        request_id=newer.request_id or older.request_id,
    )


class ErrorCounts:
    """Errors by fingerprint, at most `MOST`: beyond that the one that wasn't seen for longest is forgotten."""

    def __init__(self) -> None:
        self._errors: dict[str, TrackedError] = {}

    def __len__(self) -> int:
        return len(self._errors)

    def add(self, error: TrackedError) -> None:
        before = self._errors.pop(error.fingerprint, None)
        self._errors[error.fingerprint] = error if before is None else added(before, error)
        if len(self._errors) > MOST:
            del self._errors[next(iter(self._errors))]

    def take(self) -> list[TrackedError]:
        """All of them; none are left."""
        errors, self._errors = [*self._errors.values()], {}
        return errors


class ErrorTracker:
    """One process's errors, handed to `deliver` on the event loop's thread in batches. Make it on the running loop.

    `note` may be called from any thread and never waits.
    """

    def __init__(self, process: str, deliver: Callable[[list[TrackedError]], None], *, model: str = "") -> None:
        self.process = process
        self._model = model
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._counts = ErrorCounts()
        self._lock = threading.Lock()
        self._due = False
        self._delivered_at = -INTERVAL

    def note(self, error: TrackedError) -> None:
        with self._lock:
            self._counts.add(error)
            due, self._due = self._due, True
        if not due:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
                self._loop.call_soon_threadsafe(self._soon)

    def flush(self) -> None:
        """Hand on what is there, now. On the event loop's thread."""
        with self._lock:
            errors = self._counts.take()
            self._due = False
        if errors:
            self._delivered_at = self._loop.time()
            self._deliver(errors)

    def _soon(self) -> None:
        left = self._delivered_at + INTERVAL - self._loop.time()
        if left <= 0:
            self.flush()
        else:
            self._loop.call_later(left, self.flush)

    def watch_log(self, event: MutableMapping[str, Any]) -> None:
        """Note what a log line says that is an error, or a failure that was survived: a warning with a reason or an exception.

        What made a request fail is noted where the request ends, which knows more; an engine's process knows no such place.
        """
        level = event.get("level")
        if level not in ("error", "critical") and not (level == "warning" and ("reason" in event or "exc_info" in event)):
            return
        if self.process == "api" and level != "warning" and "request_id" in event:
            return
        error = _exception(event)
        said = str(event.get("event", ""))
        logger = event.get("logger")
        # Other libraries put values into their texts.
        code = said[:120] if logger is None else f"{logger}: {steady(re.split(_VALUE, said)[0]).strip()}"[:120]
        self.note(
            tracked(
                _word(event, "child") or self.process,
                code,
                error,
                model=_word(event, "model") or self._model,
                detail=next((steady(str(event[name])) for name in _REASONS if name in event), ""),
                request_id=_word(event, "request_id"),
            )
        )


def _word(event: Mapping[str, Any], name: str) -> str:
    value = event.get(name)
    return value if isinstance(value, str) else ""


def _exception(event: Mapping[str, Any]) -> BaseException | None:
    given = event.get("exc_info")
    if isinstance(given, BaseException):
        return given
    if isinstance(given, tuple) and len(given) == 3:
        return given[1] if isinstance(given[1], BaseException) else None
    return sys.exc_info()[1] if given else None
