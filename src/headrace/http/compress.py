"""GZip for whole answers that are worth it; streams pass untouched, and untouched by any wrapper of `send`, too."""

from __future__ import annotations

import asyncio
import gzip

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALLEST = 1024
"""Bytes from which compressing is worth its time."""
LARGE = 65536
"""Bytes from which it is done in a thread (zlib releases the GIL)."""
LEVEL = 5


class Compress:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _accepts(scope):
            await self._app(scope, receive, send)
            return
        held: Message | None = None

        async def send_compressed(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and _compressible(message):
                held = message
                return
            if held is not None:
                start, held = held, None
                body = message.get("body", b"")
                if len(body) >= SMALLEST and not message.get("more_body", False):
                    packed = await asyncio.to_thread(_pack, body) if len(body) >= LARGE else _pack(body)
                    message = {"type": "http.response.body", "body": packed}
                    start = {**start, "headers": _packed_headers(start["headers"], len(packed))}
                await send(start)
            await send(message)

        await self._app(scope, receive, send_compressed)


def _accepts(scope: Scope) -> bool:
    for name, value in scope["headers"]:
        if name == b"accept-encoding":
            for offer in value.lower().split(b","):
                coding, _, weight = offer.partition(b";")
                if coding.strip() in (b"gzip", b"*"):
                    return weight.replace(b" ", b"").rstrip(b"0.") not in (b"q=", b"q")
    return False


def _compressible(start: Message) -> bool:
    for name, value in start["headers"]:
        if name == b"content-encoding" or (name == b"content-type" and value.startswith(b"text/event-stream")):
            return False
    return True


def _packed_headers(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name not in (b"content-length", b"vary")]
    vary = [value for name, value in headers if name == b"vary"]
    return [
        *kept,
        (b"content-length", str(length).encode()),
        (b"content-encoding", b"gzip"),
        (b"vary", b", ".join([*vary, b"Accept-Encoding"])),
    ]


def _pack(body: bytes) -> bytes:
    return gzip.compress(body, LEVEL, mtime=0)
