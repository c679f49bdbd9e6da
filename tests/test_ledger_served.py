"""The bill of a whole server: hang-ups, several processes, deaths, a database that goes away, a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from bench.ledger_after_kills import run

from headrace.stores.journal import files, read
from real_servers import PostgresServer
from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow

LONG = "abcdefgh" * 60


def rows(folder: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(folder / "data" / "headrace.db", timeout=10)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM usage ORDER BY opened_at")]


def settled(folder: Path) -> list[dict[str, Any]]:
    """All rows, once none is open."""
    return eventually(lambda: (found := rows(folder)) and all(row["settled_at"] for row in found) and found, what="settled bills")


def journalled(folder: Path) -> list[Any]:
    return [row for writer in (folder / "data" / "journal").glob("[!.]*/") for path in files(writer) for row in read(path)]


def ask(server: RunningServer, prompt: str = "hello") -> httpx.Response:
    return httpx.post(f"{server.url}/chat", json={"prompt": prompt, "max_length": 4000}, timeout=30, trust_env=False)


@contextmanager
def streaming(server: RunningServer, characters: int) -> Iterator[list[str]]:
    """A stream of which at least so many characters were read; what is read, until the block is left by a hang-up."""
    got: list[str] = []
    with httpx.stream(
        "POST", f"{server.url}/chat/stream", json={"prompt": LONG, "max_length": 4000}, timeout=30, trust_env=False
    ) as answer:
        lines = answer.iter_lines()
        while len("".join(got)) < characters:
            line = next(lines)
            if line.startswith("data: "):
                got.append(line.removeprefix("data: "))
        yield got


def test_a_row_is_durable_while_its_tokens_flow_and_a_hang_up_pays_two_steps_more_at_most(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo?pace=0.05", "--max-workers", "2") as server:
        with streaming(server, 5) as got:
            (row,) = rows(tmp_path)
            assert (row["status"], row["settled_at"], row["tenant"], row["model"]) == ("open", None, "anonymous", "echo")
        received = len("".join(got))
        (row,) = settled(tmp_path)
        assert row["status"] == "cancelled"
        assert received <= row["completion_tokens"] <= received + 2
        assert row["prompt_tokens"] > len(LONG)
        for number in range(10):
            said = ask(server, "x" * (number + 1)).json()
            assert said["response"] == "x" * (number + 1)
        bill = settled(tmp_path)
        assert [row["completion_tokens"] for row in bill[1:]] == list(range(1, 11))
        assert {(row["status"], row["finish"]) for row in bill[1:]} == {("ok", "stop")}
        sums = server.client.get("/admin/usage?group_by=model,tenant").json()["usage"]
        assert [(line["model"], line["tenant"], line["requests"]) for line in sums] == [("echo", "anonymous", 11)]
        assert sums[0]["completion_tokens"] == sum(row["completion_tokens"] for row in bill)
    assert list((tmp_path / "data" / "journal").iterdir()) == []


def test_without_a_ledger_nothing_is_kept(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo", environment={"HEADRACE_LEDGER": "off"}) as server:
        assert ask(server).status_code == 200
        assert server.client.get("/admin/usage").status_code == 404
        assert rows(tmp_path) == []
        assert not (tmp_path / "data" / "journal").exists()


def test_a_key_sees_its_own_bill_and_the_command_line_all(tmp_path: Path) -> None:
    prices = '{"echo": {"input": 0.5, "output": "2.000001"}}'
    with RunningServer(tmp_path, "echo", environment={"HEADRACE_PRICES": prices, "HEADRACE_CURRENCY": "EUR"}) as server:

        def headrace(*words: str) -> str:
            command = [sys.executable, "-m", "headrace", *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, env=server.environment, check=True).stdout

        key = json.loads(headrace("keys", "create", "--name", "k", "--json"))
        mine = {"Authorization": f"Bearer {key['secret']}"}
        assert server.client.post("/chat", json={"prompt": "abc"}, headers=mine).status_code == 200
        assert ask(server, "defghijkl").status_code == 200
        bill = settled(tmp_path)
        assert [row["key"] for row in bill] == [key["id"], ""]
        assert server.client.get("/usage").status_code == 401
        assert json.loads(headrace("config", "--json"))["prices"]["value"] == {"echo": {"input": "0.5", "output": "2.000001"}}
        (line,) = server.client.get("/usage?group_by=key", headers=mine).json()["usage"]
        assert (line["key"], line["requests"], line["completion_tokens"]) == (key["id"], 1, 3)
        exact = bill[0]["prompt_tokens"] * 500_000 + 3 * 2_000_001
        assert int(line["price"].replace("0.", "", 1).ljust(12, "0")) == exact
        assert line["currency"] == "EUR"
        assert server.client.get("/usage?key=other", headers=mine).status_code == 400
        table = server.client.get("/usage?group_by=day,model", headers=mine | {"Accept": "text/csv"})
        assert table.headers["content-type"] == "text/csv; charset=utf-8"
        assert table.text.splitlines()[0].startswith("day,model,requests,prompt_tokens,")
        assert len(table.text.splitlines()) == 2
        printed = json.loads(headrace("usage", "--by", "key", "--json"))["usage"]
        assert {line["key"]: line["completion_tokens"] for line in printed} == {key["id"]: 3, "": 9}
        assert headrace("usage", "--csv", "--by", "tenant").splitlines()[0].startswith("tenant,requests")
        assert "EUR" in headrace("usage")


def test_kills_at_random_moments_cost_no_token() -> None:
    findings = run(kills=6, apis=3, workers=2, users=6, seed=7)
    assert findings.met, findings


def test_a_server_killed_whole_is_settled_by_the_next(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo?pace=0.02") as server:
        with streaming(server, 10) as got:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        received = len("".join(got))
        assert [row["settled_at"] for row in rows(tmp_path)] == [None]
        server.start()
        eventually(server._ready_url, what="readiness")
        # Before it serves: budgets begin with the bill.
        (row,) = rows(tmp_path)
        assert row["status"] == "interrupted"
        assert row["completion_tokens"] >= received
        assert row["prompt_tokens"] > len(LONG)


def test_postgresql_stopped_and_started_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    with PostgresServer() as postgres:
        environment = {"HEADRACE_DATABASE_URL": postgres.url}
        with RunningServer(tmp_path, "echo", environment=environment) as server:

            def billed() -> tuple[int, int]:
                lines = server.client.get("/admin/usage").json().get("usage", ())
                return (lines[0]["requests"], lines[0]["completion_tokens"]) if lines else (0, 0)

            for _ in range(3):
                assert ask(server, "12345").status_code == 200
            eventually(lambda: billed() == (3, 15), what="three on the bill")
            postgres.stop()
            assert server.client.get("/admin/usage").status_code == 503
            for _ in range(4):
                assert ask(server, "12345").status_code == 200
            eventually(lambda: sum(row.settled_at is not None for row in journalled(tmp_path)) == 4, what="the journal")
            pid = server.ps()["api"][0]["pid"]
            os.kill(pid, signal.SIGKILL)  # its journal outlives it
            server.client.close()
            server.client = httpx.Client(base_url=server.url, timeout=30, trust_env=False, headers=server.operator())
            postgres.start()
            eventually(lambda: billed() == (7, 35), within=30, what="seven on the bill")
            assert ask(server, "12345").status_code == 200
            eventually(lambda: billed() == (8, 40), what="eight on the bill")
            assert journalled(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="a small disk needs root, to mount it")
def test_a_full_disk_refuses_requests_and_bills_what_runs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "none", str(data)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this machine's root may not mount anything")
    try:
        with RunningServer(tmp_path, "echo?pace=0.02") as server:
            assert ask(server).status_code == 200
            with streaming(server, 5):
                filler = data / "filler"
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                # What is left of pages that are begun takes a few rows more.
                refused = eventually(lambda: (said := ask(server)).status_code != 200 and said, what="a refusal")
                assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
                assert "retry-after" in refused.headers
                ran = len(rows(tmp_path))
                threads = [threading.Thread(target=ask, args=(server,)) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert len(rows(tmp_path)) == ran
                filler.unlink()
            eventually(lambda: ask(server).status_code == 200, what="room again")
            bill = settled(tmp_path)
            assert [row["status"] for row in bill].count("cancelled") == 1
            assert all(row["completion_tokens"] >= 5 for row in bill)
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)
        shutil.rmtree(data, ignore_errors=True)


def test_a_shared_and_a_cached_answer_are_billed_once(tmp_path: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "x" * 40}], "temperature": 0, "max_tokens": 100}
    with RunningServer(tmp_path, "echo?pace=0.02", environment={"HEADRACE_RESPONSE_CACHE": "on"}) as server:

        def post() -> None:
            httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=30, trust_env=False).raise_for_status()

        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        post()
        bill = eventually(lambda: len(found := settled(tmp_path)) == 5 and found, what="five rows")
        assert sorted(row["completion_tokens"] for row in bill) == [0, 0, 0, 0, 40]
        assert sum(row["prompt_tokens"] > 0 for row in bill) == 1
        assert [row["status"] for row in bill].count("cached") >= 1
        # Somebody who shares it leaves, and then the last one: what the engine made is on the bill, once.
        asked["messages"] = [{"role": "user", "content": "y" * 200}]
        streams = asked | {"stream": True, "max_tokens": 1000}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=streams, trust_env=False) as first:
            begun = first.iter_lines()
            next(begun)
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=streams, trust_env=False) as second:
                lines = second.iter_lines()
                for _ in range(20):
                    next(lines)
                first.close()
                for _ in range(20):
                    next(lines)
        eventually(lambda: server.worker()["running"] == 0, what="the end")
        bill = eventually(lambda: len(found := settled(tmp_path)) == 7 and found, what="seven rows")[5:]
        assert {row["status"] for row in bill} == {"cancelled"}
        assert all(0 < row["completion_tokens"] < 200 for row in bill)
        assert sum(row["prompt_tokens"] > 0 for row in bill) == 1
