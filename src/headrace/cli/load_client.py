"""One request of a load: how it is sent, and what is seen of its answer while that streams in.

HTTP/1.1 is read from an `asyncio.Protocol` with httptools, and chunks are decoded with msgspec: 8 µs a chunk on uvloop (20 on asyncio's
own loop), where httpx takes over 100.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import SplitResult, urlsplit

import httptools
import msgspec

from headrace.cli.sse import EventReader

Api = Literal["openai", "native"]


class LoadFailed(Exception):
    """Nothing could be measured: the server is away, or has no model to ask."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. Times are `time.perf_counter()` seconds."""

    number: int
    started: float
    ended: float
    first: float | None = None
    """When the first text came."""
    last: float | None = None
    """When the last text came."""
    tokens: int = 0
    """Completion tokens as the server counted them, or the chunks with text where it didn't."""
    prompt_tokens: int = 0
    finish: str | None = None
    error: str | None = None
    """The kind of failure; None is success."""

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return None if self.first is None else self.first - self.started

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, seconds."""
        return (self.last - self.first) / (self.tokens - 1) if self.first and self.last and self.tokens > 1 else None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class _ChunkDelta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _ChunkDelta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Done(msgspec.Struct):
    """`event: done` of `/chat/stream`."""

    tokens_used: int = 0
    """Prompt and completion together."""
    finish_reason: str | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_done = msgspec.json.Decoder(_Done).decode


class Failure(Exception):
    """A request failed; the message is the kind it is counted under."""


class Lost(Failure):
    """The connection ended before a byte of the answer came."""


class Answer:
    """What is known of an answer while it streams in."""

    __slots__ = ("body", "chunks", "done", "failure", "finish", "first", "last", "native", "prompt_tokens", "reader", "tokens")

    def __init__(self, native: bool, prompt_tokens: int | None = None) -> None:
        """`prompt_tokens` were counted beforehand, for the native route."""
        self.native = native
        self.reader = EventReader()
        self.body = b""
        self.first: float | None = None
        self.last: float | None = None
        self.chunks = self.tokens = 0
        self.prompt_tokens = prompt_tokens or 0
        self.finish: str | None = None
        self.done = False
        self.failure: str | None = None

    def feed(self, data: bytes, now: float) -> None:
        for name, text in self.reader.feed(data):
            if self.native:
                self._native_event(name, text, now)
            elif text == b"[DONE]":
                self.done = True
            else:
                self._chunk(text, now)

    def _text(self, now: float) -> None:
        self.chunks += 1
        self.last = now
        if self.first is None:
            self.first = now

    def _chunk(self, text: bytes, now: float) -> None:
        chunk = _decode_chunk(text)
        if chunk.error is not None:
            self.failure = f"stream: {_error_code(text)}"
        for choice in chunk.choices:
            if choice.delta is not None and (choice.delta.content or choice.delta.reasoning_content):
                self._text(now)
            if choice.finish_reason is not None:
                self.finish = choice.finish_reason
        if chunk.usage is not None:
            self.tokens, self.prompt_tokens = chunk.usage.completion_tokens, chunk.usage.prompt_tokens

    def _native_event(self, name: bytes, text: bytes, now: float) -> None:
        if name == b"done":
            done = _decode_done(text)
            self.finish, self.done = done.finish_reason, True
            if self.prompt_tokens:
                self.tokens = max(0, done.tokens_used - self.prompt_tokens)
        elif name == b"error":
            self.failure = f"stream: {_error_code(text)}"
        elif text:
            self._text(now)


class Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._told: Callable[[int | Failure], None] | None = None
        self._started = False
        self._until_close = True
        self._streams = False
        self._now = 0.0
        self.usable = True

    def begin(self, request: bytes, answer: Answer, told: Callable[[int | Failure], None]) -> None:
        """Send, and feed `answer` until the response is complete; then `told` is called with the status, or why there is none."""
        assert self._transport is not None
        self._answer, self._started, self._until_close, self._streams = answer, False, True, False
        self._told = told
        self._transport.write(request)

    async def ask(self, request: bytes, answer: Answer) -> int:
        """As `begin`, and wait. Returns the status. Raises `Failure`."""
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def told(outcome: int | Failure) -> None:
            if waiter.done():
                return
            if isinstance(outcome, Failure):
                waiter.set_exception(outcome)
            else:
                waiter.set_result(outcome)

        self.begin(request, answer, told)
        return await waiter

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._started = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            inner = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
            self._end(inner if isinstance(inner, Failure) else Failure("not HTTP/1.1 or not the protocol expected"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if not self._started:
            self._end(Lost("connection closed without an answer"))
        elif self._until_close and exc is None and self._parser.get_status_code():
            self._finish()
        else:
            self._end(Failure("connection lost"))

    # httptools' calls

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._until_close = False
        elif name == b"content-type":
            self._streams = value.startswith(b"text/event-stream")

    def on_body(self, body: bytes) -> None:
        if self._answer is None:
            return
        if self._streams:
            try:
                self._answer.feed(body, self._now)
            except msgspec.DecodeError as error:
                raise Failure("an event is not the JSON expected") from error
        else:
            self._answer.body += body

    def on_message_complete(self) -> None:
        self.usable = self.usable and self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        self._end(self._parser.get_status_code())

    def _end(self, outcome: int | Failure) -> None:
        told, self._told = self._told, None
        if told is not None:
            told(outcome)


@dataclass(frozen=True, slots=True)
class Address:
    parts: SplitResult
    host: str
    port: int
    base: str
    """The path before `/v1` or `/chat`."""
    native: bool

    @property
    def path(self) -> str:
        return self.base + ("/chat/stream" if self.native else "/v1/chat/completions")

    @classmethod
    def of(cls, url: str, api: Api) -> Address:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise LoadFailed(f"{url} has no valid port.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadFailed(f"{url} is not an http:// or https:// URL.")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts, parts.hostname, port or (443 if parts.scheme == "https" else 80), base, api == "native")

    def request(self, method: str, body: bytes, key: str | None, path: str | None = None, *, cached: bool = False) -> bytes:
        lines = [
            f"{method} {path or self.path} HTTP/1.1",
            f"Host: {self.parts.netloc.rpartition('@')[2]}",
            "Accept: text/event-stream, application/json",
            "User-Agent: headrace-bench",
        ]
        if not cached:
            lines.append("Cache-Control: no-store")
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if key:
            lines.append(f"Authorization: Bearer {key}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def connect(self) -> Connection:
        context = ssl.create_default_context() if self.parts.scheme == "https" else None
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self.port, ssl=context)
        return connection


async def ask(
    address: Address, connection: Connection | None, number: int, request: bytes, timeout: float, prompt: int | None
) -> tuple[Sample, Connection | None]:
    """One request over a kept connection, or over a new one where there is none or the server had closed it."""
    started = time.perf_counter()
    answer = Answer(address.native, prompt)
    try:
        async with asyncio.timeout(timeout):
            kept = connection is not None and connection.usable
            if connection is None or not connection.usable:
                connection = await address.connect()
            try:
                error = wrong(await connection.ask(request, answer), answer)
            except Lost:
                if not kept:
                    raise
                connection = await address.connect()
                error = wrong(await connection.ask(request, answer), answer)
    except TimeoutError:
        error = TIMEOUT
    except Failure as failure:
        error = str(failure)
    except OSError as failure:
        error = unreachable(failure)
    if connection is not None and not goes_on(error):
        connection.close()
        connection = None
    return sample(number, started, answer, error), connection


TIMEOUT = "timeout"


def wrong(status: int, answer: Answer) -> str | None:
    """The kind of failure that a complete response is, if it is one."""
    if status != 200:
        return f"http {status} {_error_code(answer.body)}".strip()
    if answer.failure is not None:
        return answer.failure
    return None if answer.done or answer.finish is not None else "stream ended early"


def unreachable(failure: OSError) -> str:
    return f"connect: {failure.strerror or type(failure).__name__}"


def goes_on(error: str | None) -> bool:
    """Whether the connection is of use after a request that ended so."""
    return error is None or error.startswith("http ")


def sample(number: int, started: float, answer: Answer, error: str | None) -> Sample:
    """A request that has just ended."""
    return Sample(
        number=number,
        started=started,
        ended=time.perf_counter(),
        first=answer.first,
        last=answer.last,
        tokens=answer.tokens or answer.chunks,
        prompt_tokens=answer.prompt_tokens,
        finish=answer.finish,
        error=error,
    )


async def reach(address: Address) -> None:
    try:
        (await address.connect()).close()
    except OSError as error:
        raise LoadFailed(f"No server answers at {address.host}:{address.port}: {error.strerror or error}.") from error


async def first_model(address: Address, key: str | None, timeout: float) -> str:
    path = address.base + "/v1/models"
    answer = Answer(native=False)
    try:
        async with asyncio.timeout(min(timeout, 30)):
            connection = await address.connect()
            try:
                status = await connection.ask(address.request("GET", b"", key, path), answer)
            finally:
                connection.close()
    except TimeoutError as error:
        raise LoadFailed(f"{path} at {address.host}:{address.port} did not answer in time.") from error
    except OSError as error:
        raise LoadFailed(f"No server answers at {address.host}:{address.port}: {error.strerror or error}.") from error
    except Failure as error:
        raise LoadFailed(f"{path} at {address.host}:{address.port}: {error}.") from error
    if status != 200:
        raise LoadFailed(f"{path} at {address.host}:{address.port} answered {status} {_error_code(answer.body)}; name a model or a key.")
    try:
        listed = msgspec.json.decode(answer.body)
        return str(listed["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError) as error:
        raise LoadFailed(f"{path} at {address.host}:{address.port} lists no model; name one.") from error


async def count_prompts(address: Address, texts: list[str], model: str | None, key: str | None, timeout: float) -> dict[str, int]:
    """Tokens of each prompt as the server's template writes it, by `/tokenize`; of none where it can't say."""
    counts: dict[str, int] = {}
    connection: Connection | None = None
    try:
        for text in texts:
            asked = {"messages": [{"role": "user", "content": text}]} | ({"model": model} if model else {})
            answer = Answer(native=False)
            async with asyncio.timeout(timeout):
                if connection is None or not connection.usable:
                    connection = await address.connect()
                status = await connection.ask(address.request("POST", msgspec.json.encode(asked), key, address.base + "/tokenize"), answer)
            if status != 200:
                return {}
            counts[text] = msgspec.json.decode(answer.body, type=_Counted).count
    except (OSError, TimeoutError, Failure, msgspec.MsgspecError):
        return {}
    finally:
        if connection is not None:
            connection.close()
    return counts


class _Counted(msgspec.Struct):
    count: int


def _error_code(body: bytes) -> str:
    """The short code in an error body of OpenAI's or of the native shape, for counting by kind."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return ""
    if isinstance(said, dict):
        inner = said.get("error", said)
        if isinstance(inner, dict):
            for name in ("code", "type"):
                if isinstance(inner.get(name), str):
                    return str(inner[name])
    return ""
