"""A small server that speaks the protocol, for the commands that are clients of one."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ProtocolServer:
    """Answers chat requests with the words that the last message asks for; `plan` makes it misbehave."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    plan: str = "answer"
    words: list[str] = field(default_factory=lambda: ["Hello", " there", "\u2028friend"])
    usage: bool = True
    tokenizes: bool = True
    together: int = 1
    """Answers begin only when so many requests are there."""
    running: int = 0
    most_running: int = 0
    barrier: asyncio.Barrier | None = None
    hold: threading.Event = field(default_factory=threading.Event)
    """Under the plan `hang`, a stream goes on after its first word only when this is set."""
    hung_up: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.route(scope["path"], json.loads(body) if body else {}, receive, send)
        finally:
            self.running -= 1

    async def route(self, path: str, body: dict[str, Any], receive: Any, send: Any) -> None:
        if path == "/v1/models":
            await self.json(send, 200, {"object": "list", "data": [{"id": "small", "object": "model"}]})
        elif path == "/admin/ps":
            if self.plan == "forbid":
                await self.json(send, 403, {"detail": "no"})
                return
            worker = {"pid": 17, "model": "small", "state": "ready", "restarts": 0, "running": 1, "waiting": 2, "memory_mib": 420.5}
            await self.json(send, 200, {"workers": [worker], "version": "0.1.0"})
        elif path == "/tokenize":
            await self.json(send, 200 if self.tokenizes else 404, {"tokens": [1] * 7, "count": 7})
        elif path in ("/v1/chat/completions", "/chat/stream"):
            self.bodies.append(body)
            await self.wait_for_others()
            if self.plan == "busy":
                await self.json(send, 503, {"error": {"message": "Too many are waiting.", "code": "overloaded"}})
            else:
                await self.stream(path == "/chat/stream", body, receive, send)
        else:
            await self.json(send, 404, {"detail": "Not Found"})

    async def wait_for_others(self) -> None:
        if self.together > 1:
            self.barrier = self.barrier or asyncio.Barrier(self.together)
            await self.barrier.wait()

    async def stream(self, native: bool, body: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})

        async def say(text: str) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        def chunk(**said: Any) -> str:
            return f"data: {json.dumps({'choices': [], **said}, ensure_ascii=False)}\n\n"

        await say(": waiting\n\n")
        if not native:
            await say(chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]))
        for number, word in enumerate(self.words):
            if self.plan == "hang" and number == 1:
                while not self.hold.is_set():
                    done, _ = await asyncio.wait([asyncio.ensure_future(receive())], timeout=0.02)
                    if done and next(iter(done)).result()["type"] == "http.disconnect":
                        self.hung_up.set()
                        return
            if self.plan == "break" and number == 1:
                await say(
                    'event: error\ndata: {"detail": "broke", "code": "engine_died"}\n\n'
                    if native
                    else chunk(error={"message": "broke", "code": "engine_died"})
                )
                await send({"type": "http.response.body", "body": b""})
                return
            if self.plan == "drop" and number == 1:
                raise ConnectionError("the plan is to drop the stream")
            await say(f"data: {word}\n\n" if native else chunk(choices=[{"index": 0, "delta": {"content": word}, "finish_reason": None}]))
        if native:
            done_event = {"tokens_used": 7 + 2 * len(self.words), "processing_time": 0.1, "finish_reason": "stop"}
            await say(f"event: done\ndata: {json.dumps(done_event)}\n\n")
        else:
            await say(chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]))
            if self.usage and body.get("stream_options", {}).get("include_usage"):
                await say(chunk(usage={"prompt_tokens": 7, "completion_tokens": 2 * len(self.words), "total_tokens": 0}))
            await say("data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})

    async def json(self, send: Any, status: int, said: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(said).encode()})
