"""The first steps, before anyone waits for them: libraries compile for the shapes they meet, and the pace is learnt."""

from __future__ import annotations

from headrace.engine.stepper import Stepper
from headrace.errors import HeadraceError
from headrace.types import GenerateRequest, Sampling

PROMPTS = (160, 40)
"""Tokens of the prompts that are prefilled alone."""
BATCH = 16
"""Sequences that decode together."""


def warm_up(stepper: Stepper) -> None:
    """Serve a few requests of the sizes that will occur. Raises what the model raises: it is no use then."""
    longest = stepper.context_length - 4
    prompts = [min(tokens, longest) for tokens in PROMPTS if longest > 0]
    for number, tokens in enumerate(prompts):
        stepper.add(_request(f"prompt-{number}", tokens, 1), _check, 0.0)
        _drain(stepper)
    if longest > 0:
        stepper.add(_request("batch", 1, BATCH), _check, 0.0)
        _drain(stepper)


def _request(name: str, tokens: int, choices: int) -> GenerateRequest:
    # Greedy alone and drawn in a batch: a runner may compute less for the former.
    sampling = Sampling(max_tokens=3, n=choices, temperature=float(choices > 1), seed=0, ignore_eos=True)
    return GenerateRequest(id=name, prompt=[0] * tokens, sampling=sampling)


def _check(events: object) -> None:
    if isinstance(events, HeadraceError):
        raise events


def _drain(stepper: Stepper) -> None:
    while not stepper.idle:
        stepper.step()
        outbox, stepper.outbox = stepper.outbox, []
        for deliver, events in outbox:
            deliver(events)
