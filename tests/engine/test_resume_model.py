"""The deterministic engine over the real model: to the last bit the same, whoever else is there and however often it dies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from headrace.engine.openvino_runner import OpenVinoRunner
from headrace.engine.stepper import Stepper
from headrace.models.tokenizer import load_tokenizer
from headrace.ports import Tokenizer
from headrace.types import Delta, Event, GenerateRequest, ModelFiles, Report, Resume, Sampling

pytestmark = pytest.mark.slow

STORY = "The old mill stood at the bend of the river, and its wheel had not turned for thirty years. " * 8


@pytest.fixture(scope="module")
def tokenizer(default_model: ModelFiles) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
def runner(default_model: ModelFiles) -> OpenVinoRunner:
    made = OpenVinoRunner(
        Path(default_model.folder),
        num_blocks=64,
        kv_bytes=None,
        context_length=1024,
        max_sequences=8,
        threads=None,
        deterministic=True,
    )
    made.load()
    return made


def play(stepper: Stepper, *requests: GenerateRequest) -> dict[str, list[Event]]:
    heard: dict[str, list[Event]] = {}
    for request in requests:
        heard[request.id] = []
        stepper.add(request, heard[request.id].extend, 0.0)  # type: ignore[arg-type]
    while not stepper.idle:
        stepper.step()
        outbox, stepper.outbox = stepper.outbox, []
        for deliver, events in outbox:
            deliver(events)
    return heard


def drawn(events: Sequence[Event]) -> list[tuple[int, float, tuple[object, ...]]]:
    assert isinstance(events[-1], Report)
    return [(one.token, one.logprob, one.top) for event in events if isinstance(event, Delta) for one in event.logprobs]


def test_to_the_last_bit(runner: OpenVinoRunner, tokenizer: Tokenizer) -> None:
    def fresh(**more: int) -> Stepper:
        return Stepper(
            runner,
            tokenizer,
            prefix_cache=True,
            deterministic=True,
            **{"context_length": 1024, "max_sequences": 8, "step_tokens": 256, **more},
        )

    sampling = Sampling(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True, logprobs=4)
    request = GenerateRequest(id="r", prompt=tokenizer.encode(STORY), sampling=sampling)
    others = [GenerateRequest(id=f"{size}", prompt=tokenizer.encode(STORY[size:]), sampling=sampling) for size in (650, 700)]
    assert len(request.prompt) > 128
    undisturbed = drawn(play(fresh(), request)["r"])
    assert drawn(play(fresh(step_tokens=40), others[0], request, *others[1:])["r"]) == undisturbed
    tokens = tuple(token for token, _, _ in undisturbed)
    for dead_at in (1, 8):
        again = msgspec.structs.replace(request, resume=Resume((tokens[:dead_at],)))
        assert drawn(play(fresh(), *others, again)["r"]) == undisturbed[dead_at:]
