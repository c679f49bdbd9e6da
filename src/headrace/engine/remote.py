"""An engine that is somewhere else: any server that speaks OpenAI's chat and completions API.

It templates and tokenizes by itself, so it is sent messages and text, and token ids are unknown: each piece of text counts as
one token (`remote_wire.PSEUDO_TOKEN`) until the upstream's usage, in the `Report`, says how many there were.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx

from headrace.engine.remote_wire import Answer, EventLines, body_of, refusal
from headrace.errors import BadRequest, DeadlineExceeded, EngineUnavailable, HeadraceError, ModelError, UpstreamError
from headrace.types import EngineCard, EngineStats, Event, GenerateRequest

CAPABILITIES = frozenset(
    {"messages", "seed", "n", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "logit_bias"}
)
CONNECT_TIMEOUT = 10.0
"""Seconds."""
START_TIMEOUT = 30.0
SILENCE = 600.0
"""Seconds without a byte from the upstream, for requests without a timeout."""
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer that isn't streamed."""
_CONTEXT_FIELDS = ("context_length", "max_model_len", "context_window")
_OF_USAGE = re.compile(r"stream_options|include_usage", re.IGNORECASE)
"""In a refusal: the upstream may do without."""
_OF_STREAMS = re.compile(r"\bstream(s|ing|ed)?\b", re.IGNORECASE)


class RemoteEngine:
    """`ports.Engine` over the base URL of an OpenAI-compatible server, which ends in `/v1` as a rule.

    `model`: the upstream's name of the model; None is the first that it lists. `context_length` 0: what the upstream says, or unknown.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        model: str | None = None,
        api_key: str | None = None,
        context_length: int = 0,
        fingerprint: str = "",
        options: Mapping[str, str] | None = None,
    ) -> None:
        if options:
            raise ModelError(f"A remote engine's URL has no options; it says {', '.join(options)}.")
        self._url = url.rstrip("/")
        self._name = name
        self._model = model
        self._context_length = context_length
        self._fingerprint = fingerprint
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client: httpx.AsyncClient | None = None
        self._streams = True
        self._usage = True
        self._running = 0
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0

    async def start(self) -> EngineCard:
        """Ask the upstream which models it has. Raises `ModelError`."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                headers=self._headers,
                timeout=httpx.Timeout(SILENCE, connect=CONNECT_TIMEOUT),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            )
        try:
            return await self._describe(self._client)
        except BaseException:
            await self.close()
            raise

    async def _describe(self, client: httpx.AsyncClient) -> EngineCard:
        listed = await self._list(client)
        if self._model is None:
            if not listed:
                raise ModelError(f"{self._url} lists no models; say which to ask for with HEADRACE_REMOTE_MODEL.")
            self._model = str(listed[0]["id"])
        described = next((model for model in listed if model["id"] == self._model), {})
        return EngineCard(
            model=self._name,
            kind="remote",
            context_length=self._context_length or _context_length(described),
            vocab_size=0,
            fingerprint=f"{self._fingerprint}:{self._model}",
            capabilities=CAPABILITIES,
        )

    async def _list(self, client: httpx.AsyncClient) -> list[dict[str, Any]]:
        try:
            answer = await client.get(f"{self._url}/models", timeout=START_TIMEOUT)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ModelError(f"{self._url} doesn't answer ({_why(error)}). Is the server running, and is the URL right?") from error
        if answer.status_code in (401, 403):
            raise ModelError(f"{self._url} refused this server's key; set HEADRACE_REMOTE_API_KEY.")
        try:
            listed = answer.json()["data"] if answer.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            listed = None
        if isinstance(listed, list):
            return [model for model in listed if isinstance(model, dict) and isinstance(model.get("id"), str)]
        if self._model is None:
            raise ModelError(
                f"{self._url}/models doesn't list models (status {answer.status_code}). The URL should end in /v1 as a rule; "
                "or say which model to ask for with HEADRACE_REMOTE_MODEL."
            )
        return []

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        """Raises `BadRequest`, `RateLimited`, `Overloaded`, `UpstreamError`, `EngineUnavailable` and `DeadlineExceeded`."""
        if self._client is None or self._model is None:
            raise EngineUnavailable("The remote engine is not started.")
        self._running += 1
        began = time.monotonic()
        first: float | None = None
        answer = Answer(request.sampling.n)
        deadline = None if request.timeout is None else asyncio.get_running_loop().time() + request.timeout
        batches = self._ask(self._client, self._model, request, answer)
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        batch = await anext(batches, None)
                except TimeoutError:
                    raise DeadlineExceeded(f"The upstream server took longer than the request's {request.timeout:g} s.") from None
                if batch is None:
                    break
                self._steps += 1
                if first is None:
                    first = time.monotonic()
                yield batch
            if not answer.complete:
                raise UpstreamError("The upstream server ended its answer before it was complete.")
            now = time.monotonic()
            report = answer.report(queue_ms=0.0, prefill_ms=1000 * ((first or now) - began), decode_ms=1000 * (now - (first or now)))
            self._prompt_tokens += report.prompt_tokens
            self._cached_tokens += report.cached_tokens
            self._completion_tokens += report.completion_tokens
            yield [report]
        finally:
            self._running -= 1
            await batches.aclose()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
        )

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _ask(
        self, client: httpx.AsyncClient, model: str, request: GenerateRequest, answer: Answer
    ) -> AsyncGenerator[list[Event], None]:
        """Streamed if the upstream can do that; it is asked again without what it refuses."""
        streams, usage = self._streams, self._usage
        while True:
            try:
                batches = self._request(client, model, request, answer, stream=streams, usage=usage)
                try:
                    async for batch in batches:
                        # Kept once it has helped: what one request was refused for says nothing about the others.
                        self._streams &= streams
                        self._usage &= usage
                        yield batch
                finally:
                    await batches.aclose()
                return
            except BadRequest as refused:
                if usage and streams and _OF_USAGE.search(refused.message):
                    usage = False
                elif streams and _OF_STREAMS.search(refused.message):
                    streams = False
                else:
                    raise

    async def _request(
        self, client: httpx.AsyncClient, model: str, request: GenerateRequest, answer: Answer, *, stream: bool, usage: bool
    ) -> AsyncGenerator[list[Event], None]:
        route = "completions" if request.text is not None else "chat/completions"
        sent = client.build_request(
            "POST",
            f"{self._url}/{route}",
            json=body_of(request, model, stream=stream, usage=usage),
            headers={"x-request-id": request.id, "accept": "text/event-stream" if stream else "application/json"},
        )
        try:
            response = await client.send(sent, stream=True)
        except httpx.ConnectError as error:
            raise EngineUnavailable(f"The upstream server can't be reached ({_why(error)}).", retry_after=5) from error
        except httpx.HTTPError as error:
            raise UpstreamError(f"The upstream server didn't answer ({_why(error)}).", retry_after=1) from error
        try:
            if response.status_code != 200:
                raise await _refused(response)
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                async for batch in _events(response, answer):
                    yield batch
            else:
                batch = answer.read(await _whole(response), part="message")
                if batch:
                    yield batch
        except httpx.HTTPError as error:
            raise UpstreamError(f"The connection to the upstream server broke ({_why(error)}).", retry_after=1) from error
        finally:
            # A stream that wasn't read to its end closes its connection, which tells the upstream to stop.
            await response.aclose()


async def _events(response: httpx.Response, answer: Answer) -> AsyncGenerator[list[Event], None]:
    lines = EventLines()
    async for piece in response.aiter_bytes():
        batch = [event for data in lines.feed(piece) for event in answer.chunk(data)]
        if batch:
            yield batch
        if answer.done:
            return
    batch = [event for data in lines.finish() for event in answer.chunk(data)]
    if batch:
        yield batch


async def _whole(response: httpx.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > MAX_ANSWER:
            raise UpstreamError(f"The upstream server's answer is over {MAX_ANSWER} bytes.")
    return bytes(body)


async def _refused(response: httpx.Response) -> HeadraceError:
    return refusal(response.status_code, await _whole(response), response.headers)


def _context_length(described: Mapping[str, Any]) -> int:
    meta = described.get("meta")
    found = [described.get(field) for field in _CONTEXT_FIELDS]
    if isinstance(meta, dict):
        found += [meta.get("n_ctx"), meta.get("n_ctx_train")]
    return next((value for value in found if type(value) is int and value > 0), 0)


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
