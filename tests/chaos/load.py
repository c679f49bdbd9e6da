"""Users who ask one thing after another, each in its own way, and what became of each request.

What is asked is drawn from the seed, the user and the how many-th request of theirs it is. The echo engine says it again, so that every
byte of every answer is known beforehand.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from headrace.errors import HeadraceError

PATIENCE = 60.0
"""Seconds without a byte after which a request counts as hung."""
WORDS = ("alpha", "beta", "gamma", "naïve", "größer", "漢字", "🙂", "delta")
KINDS = {
    "chat stream": 6,
    "chat": 2,
    "native stream": 2,
    "completion stream": 2,
    "hang up": 3,
    "slow reader": 1,
    "deaf": 1,
    "deadline": 1,
    "bad": 2,
    "repeated": 1,
}
BAD: tuple[tuple[str, str, bytes, int], ...] = (
    ("POST", "/v1/chat/completions", b"{", 400),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "colour": "red"}', 400),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "model": "none"}', 404),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 9}', 400),
    ("POST", "/v1/completions", json.dumps({"prompt": "x" * 20_000}).encode(), 400),
    ("POST", "/chat", b"[]", 422),
    ("GET", "/v1/nothing", b"", 404),
)


@dataclass(frozen=True, slots=True)
class Key:
    """What a user calls with. `limited`: may be refused for its limits, and its answers be cut by them."""

    name: str
    id: str
    secret: str
    limited: bool = False


@dataclass(slots=True)
class Asked:
    """One request, as its client saw it."""

    mark: str
    kind: str
    key: Key
    text: str = ""
    """What every choice has to say."""
    choices: int = 1
    begun: float = 0.0
    over: float = 0.0
    """`time.monotonic()`."""
    id: str = ""
    status: int = 0
    said: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    total: int | None = None
    """Tokens that it was told to have cost."""
    done: int = 0
    errors: list[str] = field(default_factory=list)
    """Codes."""
    limit_note: bool = False
    from_cache: bool = False
    left: bool = False
    """By the client."""
    broken: str = ""
    """How the connection ended, where it shouldn't have."""
    nonsense: list[str] = field(default_factory=list)
    """What no server should have sent."""

    @property
    def end(self) -> str:
        if self.nonsense:
            return "nonsense"
        if self.left:
            return "left"
        if self.broken:
            return "broken"
        if self.errors:
            return f"{self.status} {self.errors[0]}" if self.status != 200 else f"error {self.errors[0]}"
        return "complete"

    @property
    def received(self) -> int:
        """Bytes of text, and so tokens at least."""
        return sum(len(text.rstrip("\N{REPLACEMENT CHARACTER}").encode()) for text in self.said.values())

    def __str__(self) -> str:
        return f"<{self.mark}> {self.kind} with {self.key.name}, {self.id or 'no id'}"


def codes(error: type[HeadraceError] = HeadraceError) -> Iterator[tuple[str, int]]:
    """Of all typed errors, with their status."""
    yield error.code, error.status
    for child in error.__subclasses__():
        yield from codes(child)


STATUS = dict(codes())


class Load:
    """`with Load(...) as load:` keeps its users busy; leaving it lets them finish."""

    def __init__(self, url: str, seed: int, keys: list[Key], *, users: int) -> None:
        self._host, self._port = url.removeprefix("http://").split(":")
        self._seed = seed
        self._keys = keys
        self._users = users
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._all: list[list[Asked]] = [[] for _ in range(users)]
        self.began = 0.0

    def __enter__(self) -> Load:
        self.began = time.monotonic()
        for user in range(self._users):
            thread = threading.Thread(target=self._use, args=(user,), name=f"user {user}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    @property
    def asked(self) -> list[Asked]:
        return [asked for mine in self._all for asked in mine]

    @property
    def hung(self) -> list[str]:
        return [thread.name for thread in self._threads if thread.is_alive()]

    def ends(self) -> dict[str, Counter[str]]:
        """How many requests of each kind ended how."""
        counted: dict[str, Counter[str]] = {}
        for asked in self.asked:
            counted.setdefault(asked.kind, Counter())[asked.end] += 1
        return counted

    def _use(self, user: int) -> None:
        number = 0
        while not self._over.is_set():
            draw = random.Random(f"request {self._seed} {user} {number}")
            asked = self._draw(draw, user, number)
            self._all[user].append(asked)
            asked.begun = time.monotonic()
            try:
                self._ask(asked, draw)
            except TimeoutError as error:
                asked.nonsense.append(f"nothing came for {PATIENCE:g} s ({error})")
            except (OSError, http.client.HTTPException) as error:
                asked.broken = type(error).__name__
            asked.over = time.monotonic()
            if asked.end != "complete":
                self._over.wait(draw.uniform(0.02, 0.2))
            number += 1

    def _draw(self, draw: random.Random, user: int, number: int) -> Asked:
        kind = draw.choices([*KINDS], [*KINDS.values()])[0]
        key = draw.choice(self._keys)
        mark = f"{user}.{number}"
        if kind == "repeated":
            number = draw.randrange(4)
            draw = random.Random(f"repeated {number}")
            mark = f"9999.{number}"
        words = [f"<{mark}>"]
        for place in range(draw.randrange(4, 40) if kind not in ("hang up", "deadline") else 120):
            words.append(f"{place:03}")
            words.append(draw.choice(WORDS))
        choices = draw.choice((1, 1, 2, 3)) if kind in ("chat stream", "completion stream") else 1
        return Asked(mark, kind, key, " ".join(words), choices)

    def _ask(self, asked: Asked, draw: random.Random) -> None:
        body: dict[str, Any] = {"stream": asked.kind != "chat", "max_tokens": 4000}
        headers = {"Authorization": f"Bearer {asked.key.secret}", "Content-Type": "application/json"}
        path = "/v1/chat/completions"
        if asked.kind == "bad":
            method, path, raw, status = draw.choice(BAD)
            self._bad(asked, method, path, raw, status, headers)
            return
        if asked.kind == "native stream":
            path, body = "/chat/stream", {"prompt": asked.text, "max_length": 4000}
        elif asked.kind == "completion stream":
            path = "/v1/completions"
            body |= {"prompt": asked.text, "n": asked.choices}
        else:
            body |= {"messages": [{"role": "user", "content": asked.text}], "n": asked.choices}
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        if asked.kind == "repeated":
            body["temperature"] = 0
        elif asked.kind == "deaf":
            body |= {"ignore_eos": True, "max_tokens": 2000}
        elif asked.kind == "deadline":
            headers["X-Request-Timeout"] = f"{draw.uniform(0.1, 3):.2f}"
        raw = json.dumps(body).encode()
        little = asked.kind in ("slow reader", "deaf")
        with _Connection(self._host, int(self._port), little=little) as connection:
            connection.request("POST", path, raw, headers)
            answer = connection.getresponse()
            asked.status = answer.status
            asked.id = answer.headers.get("x-request-id", "")
            asked.from_cache = answer.headers.get("x-headrace-cache") == "hit"
            asked.limit_note = "x-headrace-limit" in answer.headers
            if answer.status != 200:
                self._refused(asked, answer.read(), answer.status)
            elif not body.get("stream", True):
                self._whole(asked, json.loads(answer.read()))
            else:
                self._stream(asked, answer, draw)

    def _bad(self, asked: Asked, method: str, path: str, raw: bytes, status: int, headers: dict[str, str]) -> None:
        with _Connection(self._host, int(self._port)) as connection:
            connection.request(method, path, raw, headers)
            answer = connection.getresponse()
            asked.status = answer.status
            asked.id = answer.headers.get("x-request-id", "")
            said = answer.read()
            self._refused(asked, said, answer.status)
            if answer.status < 429 and answer.status != status:
                asked.nonsense.append(f"{method} {path} was answered with {answer.status}: {said[:200]!r}")

    def _refused(self, asked: Asked, said: bytes, status: int) -> None:
        told = json.loads(said)
        code = told["error"]["code"] if "error" in told else told.get("code", "invalid_request")
        asked.errors.append(code)
        if code not in STATUS:
            asked.nonsense.append(f"{status} with the unknown code {code}")

    def _whole(self, asked: Asked, told: dict[str, Any]) -> None:
        asked.done = 1
        asked.total = told["usage"]["total_tokens"]
        for choice in told["choices"]:
            asked.said[choice["index"]] = choice["message"]["content"]
            asked.finishes[choice["index"]] = choice["finish_reason"]

    def _stream(self, asked: Asked, answer: http.client.HTTPResponse, draw: random.Random) -> None:
        if asked.kind == "deaf":
            self._over.wait(draw.uniform(0.5, 6))
        hang_up_at = draw.randrange(1, 300) if asked.kind == "hang up" else None
        for event, data in _events(answer, slow=draw.uniform(0.01, 0.05) if asked.kind == "slow reader" else 0):
            if asked.done or asked.errors:
                asked.nonsense.append(f"after its end: {event} {data[:100]}")
            if event == "comment":
                asked.limit_note = asked.limit_note or "X-Headrace-Limit" in data
            elif event == "error":
                asked.errors.append(json.loads(data)["code"])
            elif event == "done":
                asked.done += 1
                told = json.loads(data)
                asked.total = told["tokens_used"]
                asked.finishes[0] = told["finish_reason"]
            elif data == "[DONE]":
                asked.done += 1
            elif asked.kind == "native stream":
                asked.said[0] = asked.said.get(0, "") + data
            else:
                _chunk(asked, json.loads(data))
            if hang_up_at is not None and asked.received >= hang_up_at:
                asked.left = True
                return
        if not asked.done and not asked.errors:
            asked.nonsense.append("the stream ended without an end")
        for code in asked.errors:
            if code not in STATUS:
                asked.nonsense.append(f"an error event with the unknown code {code}")


def _chunk(asked: Asked, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        asked.errors.append(chunk["error"]["code"])
        return
    if chunk.get("usage"):
        asked.total = chunk["usage"]["total_tokens"]
    for choice in chunk["choices"]:
        index = choice["index"]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        if index in asked.finishes and piece:
            asked.nonsense.append(f"choice {index} goes on after its end")
        asked.said[index] = asked.said.get(index, "") + piece
        if choice["finish_reason"]:
            if index in asked.finishes:
                asked.nonsense.append(f"choice {index} has two ends")
            asked.finishes[index] = choice["finish_reason"]


def _events(answer: http.client.HTTPResponse, *, slow: float) -> Iterator[tuple[str, str]]:
    """Events by name, "" for those without, and comments. Raises `http.client.IncompleteRead` where the body isn't whole."""
    held, event, data = b"", "", list[str]()
    while piece := answer.read1(256 if slow else 65536):
        *lines, held = (held + piece).split(b"\n")
        for line in map(bytes.decode, lines):
            if line.startswith(":"):
                yield "comment", line
            elif line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data.append(line.removeprefix("data: "))
            elif not line and data:
                yield event, "\n".join(data)
                event, data = "", []
        if slow:
            time.sleep(slow)


class _Connection(http.client.HTTPConnection):
    """A connection for one request; `little`: its side takes in little at a time."""

    def __init__(self, host: str, port: int, *, little: bool = False) -> None:
        super().__init__(host, port, timeout=PATIENCE)
        self._little = little

    def connect(self) -> None:
        self.sock = socket.socket()
        if self._little:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(PATIENCE)
        self.sock.connect((self.host, self.port))

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
