"""A small server of OpenAI's shape, whose answers a test writes byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn


def chunk(text: str | None = None, finish: str | None = None, *, index: int = 0, **more: Any) -> bytes:
    """One event of a chat stream."""
    delta = {} if text is None else {"content": text}
    said = {"object": "chat.completion.chunk", "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}}\n\n'
DONE = b"data: [DONE]\n\n"


@dataclass
class Reply:
    pieces: list[bytes]
    status: int = 200
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    """Stay silent after the pieces, until the client goes."""
    cut: bool = False
    """End the connection in the middle."""


class Upstream:
    """An ASGI application. `replies` are given in order, the last one again and again."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.models: Any = {"data": [{"id": "big-model", "max_model_len": 4096}, {"id": "other"}]}
        self.models_status = 200
        self.replies: list[Reply] = []
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.gone = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"] == "/v1/models":
            body = json.dumps(self.models).encode()
            await self._start(send, Reply([], self.models_status, "application/json"), len(body))
            await send({"type": "http.response.body", "body": body})
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.asked.append((scope["path"], json.loads(body), headers))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        await self._start(send, reply, None)
        for piece in reply.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        if reply.hang:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.set()
        elif reply.cut:
            raise ConnectionAbortedError
        else:
            await send({"type": "http.response.body", "body": b""})

    async def _start(self, send: Any, reply: Reply, length: int | None) -> None:
        headers = {"content-type": reply.kind, **reply.headers} | ({} if length is None else {"content-length": str(length)})
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": pairs})


@asynccontextmanager
async def serving(app: Upstream, port: int = 0) -> AsyncIterator[Upstream]:
    with socket.create_server(("127.0.0.1", port)) as listening:
        app.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
        task = asyncio.create_task(server._serve([listening]))
        try:
            yield app
        finally:
            server.should_exit = True
            await task
