"""When what is held back before an engine is looked at, by the event loop that workers really have."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from headrace.config import OverloadSection
from headrace.engine.admission import Admission
from headrace.engine.echo import EchoEngine
from headrace.engine.serving import EngineServer
from headrace.models.byte_tokenizer import ByteTokenizer


class Looked:
    """Stands for what is held back; something always is."""

    def __init__(self) -> None:
        self.looks: list[float] = []

    def __len__(self) -> int:
        return 1

    def release(self) -> None:
        self.looks.append(asyncio.get_running_loop().time())


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop() if request.param == "asyncio" else uvloop.new_event_loop()
    yield made
    made.close()


def test_a_look_comes_at_once_however_soon_the_next_one_is_due_and_once_for_many_reasons(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.engine.serving.RELEASE_INTERVAL", 60.0)
    server = EngineServer(EchoEngine(ByteTokenizer()), pid=1, admission=Admission(OverloadSection()))
    held: Any = Looked()
    server._held = held

    async def ask() -> None:
        for number in range(1, 4):
            server._release_soon()
            server._release_soon()
            await asyncio.sleep(0.01)
            assert len(held.looks) == number

    loop.run_until_complete(ask())
