from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from headrace import logs
from headrace.claims import parse_rate
from headrace.config import LogSection, ServerSection
from headrace.error_tracking import DETAIL_LENGTH, MOST, ErrorCounts, ErrorTracker, added, steady, tracked
from headrace.errors import StoreUnavailable
from headrace.records import TrackedError


def failing(text: str) -> BaseException:
    try:
        parse_rate(text)
    except ValueError as error:
        return error
    raise AssertionError


def elsewhere(text: str) -> BaseException:
    try:
        ServerSection._origins_can_match((text,))
    except ValueError as error:
        return error
    raise AssertionError


def test_a_fingerprint_is_the_place_and_not_the_message() -> None:
    one, other = tracked("api", "internal_error", failing("my secret")), tracked("api", "internal_error", failing("another"))
    assert one.fingerprint == other.fingerprint
    assert one.frames[-1].startswith("headrace.claims:parse_rate:")
    assert all(frame.startswith("headrace.") for frame in one.frames)
    assert "secret" not in repr(one)
    differing = [
        one,
        tracked("api", "internal_error", elsewhere("my secret")),
        tracked("engine", "internal_error", failing("x")),
        tracked("api", "other", failing("x")),
        tracked("api", "internal_error", failing("x"), route="/chat"),
        tracked("api", "internal_error", failing("x"), model="m"),
        tracked("api", "internal_error"),
        tracked("api", "internal_error", detail="was ended by SIGKILL"),
        tracked("api", "internal_error", detail="ended with status 3"),
    ]
    assert len({error.fingerprint for error in differing}) == len(differing)


def test_the_cause_is_named() -> None:
    error = StoreUnavailable("away")
    error.__cause__ = OSError("disk")
    assert tracked("api", "store_unavailable", error).kind == "StoreUnavailable from OSError"


@given(st.text(), st.text(), st.integers(1000, 10**12), st.floats(0, 1e6).filter(lambda x: "e" not in repr(x)))
def test_what_varies_is_left_out(one: str, other: str, number: int, seconds: float) -> None:
    def message(quoted: str) -> str:
        return f"The file {quoted!r} of req_0123456789abcdef0123456789abcdef has {number} bytes after {seconds} s."

    assert steady(message(one)) == steady(message(other)) == "The file … of req_… has … bytes after … s."
    assert len(steady(one)) <= DETAIL_LENGTH
    steady(one).encode()


def test_counts_add_up_and_the_oldest_is_forgotten() -> None:
    first, last = tracked("api", "x", request_id="req_1", at=10.0), tracked("api", "x", at=30.0)
    for both in (added(first, last), added(last, first)):
        assert (both.count, both.first_seen, both.last_seen, both.request_id) == (2, 10.0, 30.0, "req_1")
    counts = ErrorCounts()
    for number in range(MOST + 5):
        counts.add(tracked("api", f"e{number}"))
        counts.add(tracked("api", "again"))
    codes = [error.code for error in counts.take()]
    assert len(codes) == MOST
    assert "again" in codes
    assert "e0" not in codes
    assert len(counts) == 0


@pytest.mark.anyio
async def test_the_first_is_told_at_once_and_others_in_batches() -> None:
    told: list[list[TrackedError]] = []
    heard = asyncio.Event()

    def deliver(errors: list[TrackedError]) -> None:
        told.append(errors)
        heard.set()

    tracker = ErrorTracker("api", deliver)
    threads = [threading.Thread(target=lambda: tracker.note(tracked("api", "x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    await heard.wait()
    for _ in range(100):
        tracker.note(tracked("api", "y"))
        await asyncio.sleep(0)
    heard.clear()
    await heard.wait()
    assert [[(error.code, error.count) for error in errors] for errors in told] == [[("x", 4)], [("y", 100)]]
    tracker.note(tracked("api", "z"))
    tracker.flush()
    assert told[-1][0].code == "z"


@pytest.fixture
def logging_here() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


async def noted(process: str, lines: Any) -> list[TrackedError]:
    told: list[TrackedError] = []
    logs.configure(LogSection(), process, stream=sys.stdout)
    early = structlog.get_logger("early").bind(child="engine")
    tracker = ErrorTracker(process, told.extend, model="m")
    logs.watch(tracker.watch_log)
    lines(structlog.get_logger("x"), early)
    tracker.flush()
    return told


@pytest.mark.anyio
@pytest.mark.usefixtures("logging_here")
async def test_what_the_log_says_is_noted() -> None:
    def lines(log: Any, early: Any) -> None:
        log.info("fine", reason="not an error")
        log.warning("just so")
        log.warning("database away", reason="The database postgresql://x can't be used: 'secret' after 1234567")
        early.error("process ended", why="It was ended by SIGKILL.", child_pid=1)
        try:
            parse_rate("my secret")
        except ValueError:
            log.exception("it broke", request_id="req_1")
            logging.getLogger("asyncio").exception("Exception in callback <Task coro=f('my secret')>")

    found = {error.code: error for error in await noted("engine", lines)}
    assert set(found) == {"database away", "process ended", "it broke", "asyncio: Exception in callback"}
    assert "secret" not in repr(found)
    assert found["database away"].detail == "The database postgresql://x can't be used: … after …"
    assert (found["process ended"].process, found["process ended"].detail) == ("engine", "It was ended by SIGKILL.")
    broken = found["it broke"]
    assert (broken.kind, broken.request_id, broken.model) == ("ValueError", "req_1", "m")
    assert broken.frames


@pytest.mark.anyio
@pytest.mark.usefixtures("logging_here")
async def test_an_api_process_notes_a_requests_errors_at_its_end() -> None:
    def lines(log: Any, early: Any) -> None:
        log.error("request failed", request_id="req_1")
        logs.REQUEST_ID.set("req_2")
        log.error("stream failed")
        log.warning("cache level failed", reason="away")
        logs.REQUEST_ID.set("")
        log.error("not of a request")

    found = [(error.code, error.request_id) for error in await noted("api", lines)]
    assert found == [("cache level failed", "req_2"), ("not of a request", "")]
