from __future__ import annotations

import asyncio
import io
import json
import logging
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from headrace import logs
from headrace.config import LogSection
from headrace.errors import ConfigError


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_where_it_is_no_terminal() -> None:
    stream = io.StringIO()
    logs.configure(LogSection(), "api", stream=stream)
    structlog.get_logger("x").info("request", route="/chat", status=200)
    structlog.get_logger("x").debug("too quiet")
    said = lines(stream)
    assert len(said) == 1
    assert said[0].items() >= {"event": "request", "route": "/chat", "status": 200, "level": "info", "process": "api"}.items()


def test_people_on_a_terminal_and_json_in_the_file(tmp_path: Path) -> None:
    stream = Terminal()
    logs.configure(LogSection(log_file=tmp_path / "logs" / "server.log"), "api", stream=stream)
    structlog.get_logger().warning("careful", count=3)
    assert "careful" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
    assert json.loads((tmp_path / "logs" / "server.log").read_text())["count"] == 3


def test_prompts_and_keys_are_never_shown() -> None:
    stream = io.StringIO()
    logs.configure(LogSection(log_level="debug"), "api", stream=stream)
    structlog.get_logger().info("x", prompt="psst", api_key="sk-1", authorization="Bearer sk-1", messages=["psst"], text="psst")
    try:
        secret = "psst"  # noqa: F841  a traceback with variables would show it
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("uvicorn.error").exception("failed")
    assert "psst" not in stream.getvalue().replace('secret = "psst"', "")
    assert "sk-1" not in stream.getvalue()
    assert stream.getvalue().count("ValueError: broken") == 2


def test_standard_loggers_come_out_the_same_way() -> None:
    stream = io.StringIO()
    logs.configure(LogSection(), "api", stream=stream)
    logging.getLogger("uvicorn.error").error("no %s", "luck")
    logging.getLogger("httpx").info("HTTP Request: POST somewhere")
    said = lines(stream)
    assert [(line["event"], line["logger"]) for line in said] == [("no luck", "uvicorn.error")]


def test_anything_can_be_logged() -> None:
    stream = io.StringIO()
    logs.configure(LogSection(), "api", stream=stream)
    structlog.get_logger().info("odd", half="\ud800", path=Path("/x"), number=10**30, control="a\nb\x1b")
    assert len(stream.getvalue().splitlines()) == 1


def _write(path: Path, name: str, count: int) -> None:
    file = logs.RotatingFile(path, 4000, 50)
    for number in range(count):
        file.write(f"{name} {number:04} {'x' * 40}\n".encode())


def test_several_processes_share_a_rotating_file_and_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, name, 300)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    written = [line for file in tmp_path.glob("server.log*") if file.suffix != ".lock" for line in file.read_text().splitlines()]
    assert sorted(line.rpartition(" ")[0] for line in written) == sorted(f"{name} {number:04}" for name in "abc" for number in range(300))
    assert len(list(tmp_path.glob("server.log.[0-9]*"))) >= 5


@pytest.mark.parametrize(("keep", "expected"), [(0, set()), (2, {"server.log.1", "server.log.2"})])
def test_no_more_files_than_wanted_are_kept(tmp_path: Path, keep: int, expected: set[str]) -> None:
    file = logs.RotatingFile(tmp_path / "server.log", 100, keep)
    for _ in range(50):
        file.write(b"x" * 50 + b"\n")
    file.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"server.log.lock"} == {"server.log"} | expected
    assert (tmp_path / "server.log").stat().st_size <= 153


def test_a_file_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    file = logs.RotatingFile(tmp_path / "server.log", 1000, 1)
    (tmp_path / "server.log").rename(tmp_path / "elsewhere")
    file.write(b"line\n")
    file.close()
    assert (tmp_path / "server.log").read_text() == "line\n"


def test_a_folder_that_was_taken_away_is_made_again_and_no_other_file_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    file = logs.RotatingFile(folder / "server.log", 1000, 1)
    shutil.rmtree(folder)
    file.write(b"1\n")
    with (tmp_path / "another").open("wb") as another:  # gets the lowest number that is free
        file.write(b"2\n")
        another.write(b"its own\n")
    assert (folder / "server.log").read_text() == "1\n2\n"
    shutil.rmtree(folder)
    folder.touch()
    file.write(b"lost\n")
    folder.unlink()
    file.write(b"3\n")
    file.close()
    assert (folder / "server.log").read_text() == "3\n"
    assert (tmp_path / "another").read_bytes() == b"its own\n"


def test_a_file_that_cant_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "server.log", tmp_path):
        with pytest.raises(ConfigError, match=r"log_file: .* can't be written"):
            logs.configure(LogSection(log_file=path), "test")


def test_every_line_of_a_request_has_its_id() -> None:
    async def request(id: str) -> None:
        logs.REQUEST_ID.set(id)
        await asyncio.sleep(0)
        structlog.get_logger().info("ours", number=id)
        structlog.get_logger().info("explicit", request_id="req_x", number="req_x")
        logging.getLogger("elsewhere").warning("a library's")
        await asyncio.create_task(below(id))

    async def below(id: str) -> None:
        structlog.get_logger().info("a task of its own", number=id)

    async def both() -> None:
        await asyncio.gather(request("req_1"), request("req_2"))
        structlog.get_logger().info("outside")

    out = io.StringIO()
    logs.configure(LogSection(), "api", stream=out)
    asyncio.run(both())
    said = lines(out)
    assert "request_id" not in said.pop()
    assert len(said) == 8
    assert all(line["request_id"] == line.get("number", line["request_id"]) for line in said)
    assert {line["request_id"] for line in said} == {"req_1", "req_2", "req_x"}
    assert [line["request_id"] for line in said if line["event"] == "a library's"] == ["req_1", "req_2"]


def test_a_library_says_which_request() -> None:
    out = io.StringIO()
    logs.configure(LogSection(), "engine", stream=out)
    logging.getLogger("engine").warning("it failed", extra={"request_id": "req_1"})
    assert lines(out)[0]["request_id"] == "req_1"
