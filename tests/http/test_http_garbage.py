"""What a request leaves behind: nothing that only the garbage collector could find. Looking for it costs a fifth of a short answer."""

from __future__ import annotations

import gc
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving_echo import live, stand

from headrace.call import Call
from headrace.http.exchange import Exchange

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Say it again."}]
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "streamed": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "stream": True}),
    "whole": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4}),
    "several choices": ("/v1/completions", {"prompt": ["One.", "Two."], "max_tokens": 4, "stream": True}),
    "native": ("/chat", {"prompt": "Say it again.", "max_length": 4}),
    "native stream": ("/chat/stream", {"prompt": "Say it again.", "max_length": 4}),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "late": ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "model": "nobody's"}),
    "whole": ("/chat", {"prompt": "Say it again.", "model": "nobody's"}),
    "early": ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 17}),
    "of a batch": ("/chat/batch", {"prompt": "no list"}),
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> int:
    return sum(type(thing) in (Exchange, Call) for thing in gc.get_objects())


@pytest.mark.parametrize("kind", ASKED)
def test_a_request_leaves_no_cycles(kind: str, no_collector: None) -> None:
    leaves_nothing(*ASKED[kind], {200})


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_leaves_no_cycles(kind: str, no_collector: None) -> None:
    """Under overload, looking for what they left took 33 ms for every 350 of them."""
    leaves_nothing(*REFUSED[kind], {400, 404, 422})


def leaves_nothing(path: str, body: dict[str, Any], statuses: set[int]) -> None:
    with live(stand()) as served:
        url = urlsplit(served.url)
        assert url.hostname is not None
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=20)
        before = alive()
        for _ in range(20):
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status in statuses
            answer.read()
        # The connection itself holds on to its last request, and that one may have several calls.
        until = time.monotonic() + 10
        while alive() - before > 4:
            assert time.monotonic() < until, f"{alive() - before} of 20 requests' parts are still there"
            time.sleep(0.01)
        connection.close()
