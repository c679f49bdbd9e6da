"""Admits a call for its key, its tenant or its address: one atomic take before it runs, one settlement when it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from headrace.call import Call
from headrace.claims import Claim, Room, Take, Taken
from headrace.errors import HeadraceError
from headrace.policies.claimants import Claimants
from headrace.policies.rate_answers import refusal, show_limits
from headrace.policies.token_lease import LEASE, TokenLease
from headrace.ports import Limits
from headrace.types import GenerateRequest

PATIENCE = 5.0
"""Seconds that a request waits where only the unused leases of running requests are in its way."""
ASK_AGAIN = 0.05
CHARACTERS_A_TOKEN = 4
"""A guess, for engines that template by themselves: their prompts are settled by what they report."""


class Reserve:
    """Raises `RateLimited`, and `StoreUnavailable` where it can't be known what of a budget is spent.

    Comes after all that may set `call.source`: an answer that no engine makes counts as a request, and its tokens are settled at its price.
    """

    def __init__(self, claimants: Claimants, limits: Limits) -> None:
        self._claimants = claimants
        self._limits = limits

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        claims = self._claimants.claims(call)
        if not claims:
            yield
            return
        lease = await self._admit(call, claims)
        try:
            yield
        finally:
            if lease is not None:
                # A fallback comes with a lease of its own.
                call.transforms.remove(lease)
            used, guessed = used_tokens(call, lease)
            # A caller near the most requests at a time may send the next one, by way of another process, as soon as this one is over.
            wait = not call.headers_sent or any(map(_crowded, claims, self._limits.peek(claims)[1]))
            rooms = await self._limits.settle(call.id, used, guessed=guessed, wait=wait)
            if rooms is not None:
                show_limits(call, claims, rooms)

    async def _admit(self, call: Call, claims: tuple[Claim, ...]) -> TokenLease | None:
        request = call.request
        if request is None or call.source is not None:
            await self._take(call, Take(call.id, claims, 0, 0, 0))
            return None
        sampling = request.sampling
        n = sampling.n
        prompt = prompt_tokens(request)
        taken = await self._take(call, Take(call.id, claims, prompt, n * min(LEASE, sampling.max_tokens), n * min(1, sampling.max_tokens)))
        capped = taken.ceiling is not None and taken.ceiling // n < sampling.max_tokens
        if capped:
            assert taken.ceiling is not None
            most = taken.ceiling // n
            sampling = msgspec.structs.replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))
            call.request = msgspec.structs.replace(request, sampling=sampling)
        budget = taken.ceiling is not None
        lease = TokenLease(call, self._limits, granted=taken.granted, total=n * sampling.max_tokens, budget=budget, capped=capped)
        call.transforms.append(lease)
        return lease

    async def _take(self, call: Call, take: Take) -> Taken:
        """Wait for a whole first lease where running requests may give it back; take a part of one where there is no more."""
        patient_until = time.monotonic() + PATIENCE
        whole = msgspec.structs.replace(take, least=take.output)
        asked = whole
        while True:
            reply = await self._limits.take(asked)
            show_limits(call, take.claims, reply.rooms)
            if isinstance(reply, Taken):
                call.counted = True
                return reply
            if reply.passing and time.monotonic() < patient_until:
                await asyncio.sleep(ASK_AGAIN)
                asked = whole
            elif asked is whole and reply.dimension in ("tokens", "budget") and take.least < take.output:
                asked = take
            else:
                raise refusal(take.claims, reply, prompt=take.prompt)


def _crowded(claim: Claim, room: Room) -> bool:
    return claim.concurrency is not None and 2 * room.running >= claim.concurrency


def prompt_tokens(request: GenerateRequest) -> int:
    """The prompt's tokens; a guess where only the engine can count them."""
    if request.prompt:
        return len(request.prompt)
    characters = sum(len(message.content) for message in request.messages) + len(request.text or "")
    return -(-characters // CHARACTERS_A_TOKEN)


def used_tokens(call: Call, lease: TokenLease | None) -> tuple[int, bool]:
    """What the call is to be settled with, and whether that is a guess.

    Without a report the engine was stopped, and what it made until then isn't known here: it is counted at the most it can have been,
    so that a budget is never less spent than the bill says.
    """
    outcome = call.outcome
    if outcome.served_from != "engine" or outcome.own_completion_tokens is not None:
        return outcome.billed_prompt_tokens + outcome.billed_completion_tokens, False
    if lease is None:
        return 0, False
    if outcome.report is not None:
        return outcome.prompt_tokens + outcome.completion_tokens, False
    if outcome.first_token_at is None:
        return 0 if isinstance(outcome.error, HeadraceError) else outcome.prompt_tokens, True
    return outcome.prompt_tokens + lease.most_used(), True
