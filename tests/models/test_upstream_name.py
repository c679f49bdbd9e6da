"""What a model behind a URL is called, over a real server that lists models."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from engine.upstream import Upstream, serving
from headrace.config import Config, ModelSection, ResilienceSection
from headrace.errors import ModelError
from headrace.fleet import Member
from headrace.lineup import lineup
from headrace.models.resolve import resolve

pytestmark = pytest.mark.anyio


async def members(url: str, fallbacks: dict[str, tuple[str, ...]] | None = None, **model: Any) -> list[Member]:
    section = ModelSection.model_validate({"model": url, **model})
    made = Config(model=section, resilience=ResilienceSection.model_validate({"fallbacks": fallbacks or {}}))
    return (await asyncio.to_thread(lineup, made))[1]


async def test_an_unnamed_model_has_the_name_that_its_server_gives_it() -> None:
    async with serving(Upstream()) as upstream:
        upstream.models = {"data": [{"id": "Qwen/Qwen3-8B"}, {"no": "id"}]}
        (only,) = await members(upstream.url)
        assert (only.files.public_name, only.files.name, only.files.notes) == ("Qwen/Qwen3-8B", "remote", ())
        # Both mean it, in chains as in requests.
        for name in ("remote", "Qwen/Qwen3-8B"):
            assert len(await members(upstream.url, {name: ("canned: later",)})) == 1
        assert (await members(upstream.url, name="mine"))[0].files.public_name == "mine"
        assert (await members(upstream.url, remote_model="other"))[0].files.public_name == "other"
        upstream.models = {"data": [{"id": "a"}, {"id": "b"}]}
        (one,) = await members(upstream.url)
        assert one.files.public_name == "remote"
        assert "2 models (a, b). Requests go to the first, a," in one.files.notes[0]
        for odd in ({"data": "nonsense"}, {"data": [{"id": "x" * 300}]}, []):
            upstream.models = odd
            assert (await members(upstream.url))[0].files.public_name == "remote"
    # It is away: the engine says so.
    assert (await members(upstream.url))[0].files.public_name == "remote"


def test_a_url_names_the_model_that_is_asked_for(tmp_path: Path) -> None:
    files = resolve(ModelSection(model="http://127.0.0.1:9/v1?model=big"))
    assert (files.url, files.name) == ("http://127.0.0.1:9/v1", "big")
    assert files.fingerprint != resolve(ModelSection(model="http://127.0.0.1:9/v1?model=small")).fingerprint
    with pytest.raises(ModelError, match="remote_model for small"):
        resolve(ModelSection(model="http://127.0.0.1:9/v1?model=big", remote_model="small"))
    with pytest.raises(ModelError, match="empty"):
        resolve(ModelSection(model="http://127.0.0.1:9/v1?model="))
