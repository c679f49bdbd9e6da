"""Streams of whole servers whose engine workers are killed, or die of a request."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow


class ChatStream(threading.Thread):
    """A client that reads a chat completion's stream to its end."""

    def __init__(self, url: str, content: str, **more: Any) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._asked = {"messages": [{"role": "user", "content": content}], "stream": True, **more}
        self.id = ""
        self.texts: dict[int, str] = {}
        self.finishes: list[str] = []
        self.logprobs = 0
        self.usage: dict[str, Any] = {}
        self.comments = 0
        self.done = 0
        self.errors: list[dict[str, Any]] = []
        self.broken: httpx.HTTPError | None = None
        self.start()

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._asked, timeout=60, trust_env=False) as answer:
                self.id = answer.headers["x-request-id"]
                for line in answer.iter_lines():
                    if line.startswith(":"):
                        self.comments += 1
                    elif line == "data: [DONE]":
                        self.done += 1
                    elif line.startswith("data: "):
                        self._take(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.broken = error

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.errors.append(chunk["error"])
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + (choice["delta"].get("content") or "")
            self.logprobs += len((choice.get("logprobs") or {}).get("content") or ())
            if choice["finish_reason"]:
                self.finishes.append(choice["finish_reason"])

    def whole(self) -> None:
        """Waits for its end, which must be a good one."""
        self.join(90)
        assert not self.is_alive()
        assert self.broken is None
        assert self.errors == []
        assert self.done == 1


def bills(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Of each request prompt and completion tokens and status, once none is open."""
    with closing(sqlite3.connect(folder / "data" / "headrace.db", timeout=10)) as database:
        rows = database.execute("SELECT id, prompt_tokens, completion_tokens, status, settled_at FROM usage").fetchall()
    return {} if any(row[4] is None for row in rows) else {row[0]: row[1:4] for row in rows}


def kill_worker(server: RunningServer) -> None:
    """Kill the worker, and wait for the next."""
    pid = server.worker()["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: server.worker()["pid"] != pid, what="another worker", within=60)


def test_kills_are_pauses_with_keep_alives_and_one_bill(tmp_path: Path) -> None:
    environment = {"HEADRACE_KEEPALIVE_INTERVAL": "0.2", "HEADRACE_MAX_WORKERS": "2"}
    with RunningServer(tmp_path, "echo?pace=0.01&load=0.6", environment=environment) as server:
        texts = [chr(97 + number) * (220 + number) for number in range(5)]
        streams = [
            ChatStream(server.url, text, max_tokens=2000, n=1 + number % 2, stream_options={"include_usage": True})
            for number, text in enumerate(texts)
        ]
        for at in (10, 60, 110):
            eventually(lambda at=at: all(len(stream.text) > at for stream in streams), what="progress")
            kill_worker(server)
        late = ChatStream(server.url, "late", max_tokens=20)
        for number, stream in enumerate(streams):
            stream.whole()
            choices = 1 + number % 2
            assert stream.texts == dict.fromkeys(range(choices), texts[number])
            assert stream.finishes == ["stop"] * choices
            assert stream.usage["completion_tokens"] == len(texts[number]) * choices
            assert stream.comments >= 3
        late.whole()
        assert late.text == "late"
        settled = eventually(lambda: len(found := bills(tmp_path)) == 6 and found, what="the bills")
        for stream in streams:
            assert settled[stream.id] == (stream.usage["prompt_tokens"], stream.usage["completion_tokens"], "ok")
        # A hang-up during a pause pays for what it was sent.
        with httpx.stream(
            "POST", f"{server.url}/chat/stream", json={"prompt": "x" * 300, "max_length": 2000}, timeout=30, trust_env=False
        ) as answer:
            pieces = answer.iter_lines()
            sent = 0
            while sent < 10:
                sent += next(pieces).startswith("data: ")
            os.kill(server.worker()["pid"], signal.SIGKILL)
            # What came before the death is read before the first comment.
            for line in pieces:
                if line.startswith(":"):
                    break
                sent += line.startswith("data: ")
            id = answer.headers["x-request-id"]
        (_, completion, status) = eventually(lambda: bills(tmp_path).get(id), what="its bill")
        assert (completion, status) == (sent, "cancelled")


POISON = """
import sys
if "headrace.worker" in sys.orig_argv:
    import os
    from headrace.engine.echo import EchoEngine
    note = EchoEngine._note
    def deadly(self, fresh):
        note(self, fresh)
        if any(sequence.job.request.prompt.count(35) == 5 for sequence in self._running):
            os.kill(os.getpid(), 9)
    EchoEngine._note = deadly
"""


def test_a_request_that_kills_the_engine_is_refused_by_all_api_processes(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    environment = {"PYTHONPATH": str(tmp_path), "HEADRACE_MAX_WORKERS": "2"}
    with RunningServer(tmp_path, "echo?pace=0.01", environment=environment) as server:
        streams = [ChatStream(server.url, "good" * 50, max_tokens=2000) for _ in range(6)]
        eventually(lambda: all(len(stream.text) > 5 for stream in streams), what="progress")
        asked = {"model": "echo", "prompt": "#####", "max_tokens": 20, "temperature": 0}

        def ask(**more: Any) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=asked | more, timeout=30, trust_env=False)

        refused = ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "request_quarantined")
        assert server.worker()["restarts"] == 3
        for _ in range(12):  # whichever process takes it
            again = ask()
            assert (again.status_code, again.json()["error"]["code"]) == (422, "request_quarantined")
        assert ask(prompt="####").json()["choices"][0]["text"] == "####"
        for stream in streams:
            stream.whole()
            assert stream.text == "good" * 50
        assert server.worker()["restarts"] == 3
        api = server.ps()["api"]
        os.kill(api[0]["pid"], signal.SIGKILL)
        server.client.close()
        server.client = httpx.Client(base_url=server.url, timeout=30, trust_env=False)
        eventually(lambda: len([line for line in server.ps()["api"] if line["state"] == "ready" and line["pid"] != api[0]["pid"]]) == 2)
        assert {ask().status_code for _ in range(8)} == {422}
        assert server.worker()["restarts"] == 3


def test_the_model_says_the_same_after_a_kill(tmp_path: Path) -> None:
    """Deterministic: the text of eight streams is that of each alone, undisturbed."""
    environment = {"HEADRACE_DETERMINISTIC": "true", "HEADRACE_CONTEXT": "1024"}
    more = {"max_tokens": 24, "temperature": 0, "logprobs": True, "stream_options": {"include_usage": True}}
    asked = [f"Tell me {number} things about the number {number * 37}. " * (1 + 6 * (number == 3)) for number in range(1, 9)]
    with RunningServer(tmp_path, "smollm2-135m-instruct", environment=environment) as server:
        undisturbed = []
        for text in asked[:4]:
            undisturbed.append(ChatStream(server.url, text, **more))
            undisturbed[-1].whole()
        streams = [ChatStream(server.url, text, **more) for text in asked]
        eventually(lambda: sum(len(stream.text) > 15 for stream in streams) == 8, what="progress", within=60)
        kill_worker(server)
        for stream in streams:
            stream.whole()
            assert stream.usage["completion_tokens"] == stream.logprobs
        for before, after in zip(undisturbed, streams, strict=False):
            assert after.text == before.text
            assert (after.finishes, after.usage) == (before.finishes, before.usage)
