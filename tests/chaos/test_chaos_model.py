"""A short round with the real model: what it says amid deaths and stops is what it says undisturbed, to the letter."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from chaos.books import Row, rows
from chaos.conductor import Conductor
from chaos.schedule import schedule
from chaos.witness import Witness
from running_server import RunningServer, eventually
from test_streams_survive import ChatStream

pytestmark = pytest.mark.slow

SEED = 4
DEEDS = (("worker", "kill"), ("worker", "stop"), ("worker", "slow"), ("standby", "kill"), ("api", "kill"))
ASKED = {"max_tokens": 24, "temperature": 0, "logprobs": True, "cache": False, "stream_options": {"include_usage": True}}
PROMPTS = [f"Tell me {number} things about the number {number * 37}. " * (1 + 4 * (number == 3)) for number in range(1, 4)]


def test_the_models_text_is_the_undisturbed_one(tmp_path: Path) -> None:
    witness = Witness(tmp_path)
    settings = {"DETERMINISTIC": "true", "CONTEXT": "1024", "STANDBY": "true", "STALL_TIMEOUT": "2", "MAX_WORKERS": "2"}
    environment = {f"HEADRACE_{name}": value for name, value in settings.items()} | witness.environment
    with RunningServer(tmp_path, "smollm2-135m-instruct", environment=environment) as server:
        undisturbed = [ChatStream(server.url, prompt, **ASKED) for prompt in PROMPTS]
        for stream in undisturbed:
            stream.whole()
        eventually(lambda: len(server.ps()["workers"]) == 2 and server.ps()["workers"][1]["state"] == "standby", within=60)
        texts = {prompt: stream.text for prompt, stream in zip(PROMPTS, undisturbed, strict=True)}
        conductor = Conductor(server, witness, {})
        over, asked = threading.Event(), list[tuple[str, ChatStream, float]]()

        def use(prompt: str) -> None:
            while not over.is_set():
                stream = ChatStream(server.url, prompt, **ASKED)
                asked.append((prompt, stream, time.monotonic()))
                stream.join(90)

        users = [threading.Thread(target=use, args=(prompt,), daemon=True) for prompt in PROMPTS]
        for user in users:
            user.start()
        conductor.conduct(schedule(SEED, 5.0, DEEDS, pause=(0.6, 1.6)), time.monotonic())
        over.set()
        for user in users:
            user.join(90)
        sys.stdout.write("\n".join(conductor.done) + f"\n{len(asked)} requests\n")
        assert conductor.troubles == []
        bills = eventually(lambda: _settled(tmp_path), what="the bills")
        billed = {row.id: row for row in bills}
        for prompt, stream, begun in asked:
            assert not stream.is_alive()
            assert stream.errors == []
            row = billed.get(stream.id)
            if stream.broken is not None:
                assert any(death >= begun - 1 for death in conductor.api_deaths), stream.broken
                assert texts[prompt].startswith(stream.text)
                assert row is None or row.completion >= stream.logprobs
                continue
            assert (stream.text, stream.done) == (texts[prompt], 1)
            assert row is not None
            assert row.prompt + row.completion == stream.usage["total_tokens"]
            assert row.completion == stream.logprobs
        assert sum(stream.done for _, stream, _ in asked) >= len(PROMPTS)

        def calm() -> bool:
            try:
                told = httpx.get(f"{server.url}/metrics", timeout=5, trust_env=False).text
            except httpx.HTTPError:
                return False
            gauges = "sequences_running|sequences_waiting|kv_blocks_used|breaker_state|quarantine_size"
            values = re.findall(rf"^headrace_(?:{gauges}){{.*}} (\S+)$", told, re.MULTILINE)
            return len(values) == 5 and {float(value) for value in values} == {0.0}

        eventually(calm, what="an engine with all its blocks free")
        server.client.close()
        server.client = httpx.Client(base_url=server.url, timeout=30, trust_env=False)
    assert witness.processes() == []


def _settled(folder: Path) -> list[Row]:
    """All rows, once none is open."""
    found = rows(f"sqlite:///{folder}/data/headrace.db")
    return found if all(row.settled_at for row in found) else []
