"""What the HTTP tests serve: the echo engine, or an engine that follows a script, behind the real journey."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from headrace.config import AccessSection, Config, FilterSection, ServerSection
from headrace.engine.echo import EchoEngine
from headrace.http.api import create_api
from headrace.http.slow_readers import Connection
from headrace.journey import Journey
from headrace.models.byte_tokenizer import ByteTokenizer
from headrace.models.template import load_template
from headrace.ports import Engine
from headrace.served import ServedModel, ServedModels
from headrace.types import EngineCard, EngineStats, EngineStatus, Event, GenerateRequest, ModelFiles

CONTEXT = 4096
EVERYTHING = frozenset({"tokens", "logprobs", "prompt_logprobs", "logit_bias", "seed", "n", "min_p", "top_k"}) | frozenset(
    {"repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids"}
)
KEY = "sesame-open-very-secret"

Script = Callable[[GenerateRequest], AsyncIterator[list[Event]]]


@dataclass
class StandingControl:
    """The words to a supervisor that isn't there."""

    draining: bool = False
    leaving: bool = False
    refusing: bool = False
    started_at: float = field(default_factory=time.monotonic)

    async def reload(self) -> list[str]:
        return ["max_batch"]

    async def ps(self) -> dict[str, Any]:
        return {"workers": [{"pid": 1, "model": "echo", "state": "ready", "restarts": 0, "running": 0, "waiting": 0, "memory_mib": 1.0}]}


class ScriptedEngine:
    """Says what its script says; can do everything; remembers what was asked, and how often it was hung up on."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.closed = threading.Event()

    async def start(self) -> EngineCard:
        return EngineCard(
            model="scripted",
            kind="echo",
            context_length=CONTEXT,
            vocab_size=259,
            fingerprint="fp_scripted",
            capabilities=EVERYTHING,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        self.requests.append(request)
        try:
            async for batch in self.script(request):
                yield batch
        finally:
            self.closed.set()

    def stats(self) -> EngineStats:
        return EngineStats(running=2, waiting=3, steps=5)

    async def close(self) -> None: ...


@dataclass
class Stand:
    """An application, and the parts that tests look at."""

    app: FastAPI
    engine: Any
    served: ServedModel
    control: StandingControl
    url: str = ""


def stand(
    engine: Engine | None = None, *, pace: float = 0.0, keys: bool = True, filters: FilterSection | None = None, **server: Any
) -> Stand:
    files = ModelFiles(name="echo-1", kind="echo", aliases=("house",), context_length=CONTEXT)
    tokenizer = ByteTokenizer()
    engine = engine or EchoEngine(tokenizer, name="echo-1", context_length=CONTEXT, fingerprint="fp_echo", pace=pace)
    # A thread has no loop yet; the test may be on one.
    with ThreadPoolExecutor(1) as aside:
        card = aside.submit(asyncio.run, engine.start()).result()
    status = EngineStatus(state="ready")
    served = ServedModel(files=files, engine=engine, tokenizer=tokenizer, template=load_template(files), card=card, status=status)
    models = ServedModels([served])
    proxies = server.pop("trusted_proxies", ())
    access = AccessSection(api_keys=(KEY,) if keys else (), trusted_proxies=proxies)  # type: ignore[arg-type]
    config = Config(server=ServerSection(**server), access=access, filters=filters or FilterSection())
    control = StandingControl()
    app = create_api(config, models, Journey.standard(config, models), control=control)
    return Stand(app, engine, served, control)


def client(stand: Stand, address: str = "127.0.0.1") -> httpx.AsyncClient:
    """A client within the process; streams arrive whole."""
    transport = httpx.ASGITransport(app=stand.app, client=(address, 4711), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30)


@contextmanager
def live(made: Stand) -> Iterator[Stand]:
    """The application behind a real server, in a thread of its own."""
    config = uvicorn.Config(
        made.app,
        http=Connection,
        host="127.0.0.1",
        port=0,
        log_level="critical",
        lifespan="off",
        proxy_headers=False,
        access_log=False,
    )
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    sock.listen(512)
    made.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
