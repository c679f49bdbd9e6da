"""Steps are left in reverse, each told the error there is then, whatever the others do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from headrace.unwinding import Unwinding, before

pytestmark = pytest.mark.anyio


class Trouble(Exception):
    pass


def steps(seen: list[str], kinds: str) -> list[Any]:
    """Of each letter a step: p passes errors on, r raises in the end, s swallows errors."""

    @asynccontextmanager
    async def step(name: str, kind: str) -> AsyncIterator[None]:
        seen.append(f"in {name}")
        try:
            yield
        except Exception as error:
            seen.append(f"{name} sees {error}")
            if kind != "s":
                raise
        finally:
            seen.append(f"out {name}")
            if kind == "r":
                raise Trouble(name)

    return [step(f"{number}{kind}", kind) for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kinds", ["", "p", "ppp", "prp", "psp", "rsp", "srp", "rrr", "sss", "srs"])
async def test_it_unwinds_as_contextlib_does(kinds: str, fails: bool) -> None:
    told: list[list[str]] = []
    for stack in (AsyncExitStack(), Unwinding()):
        seen: list[str] = []
        enter: Any = stack.enter_async_context if isinstance(stack, AsyncExitStack) else stack.enter
        try:
            async with stack:
                for each in steps(seen, kinds):
                    await enter(each)
                if fails:
                    raise Trouble("body")
        except Trouble as error:
            seen.append(f"raised {error}")
        told.append(seen)
    assert told[0] == told[1]


async def test_what_cannot_be_entered_is_not_left() -> None:
    seen: list[str] = []

    class Refuses:
        async def __aenter__(self) -> None:
            raise Trouble("no")

        async def __aexit__(self, *args: object) -> None:
            seen.append("left")

    async def refused() -> None:
        async with Unwinding() as entered:
            await entered.enter(steps(seen, "p")[0])
            await entered.enter(Refuses())

    with pytest.raises(Trouble, match="no"):
        await refused()
    assert seen == ["in 0p", "0p sees no", "out 0p"]


async def test_a_step_before_the_call_and_nothing_after_it() -> None:
    seen: list[int] = []

    class Step:
        @before
        async def __call__(self, number: int) -> None:
            """Notes a number."""
            seen.append(number)
            if number < 0:
                raise Trouble("negative")

    async with Unwinding() as entered:
        await entered.enter(Step()(1))
        with pytest.raises(Trouble):
            await entered.enter(Step()(-1))
        async with Step()(2):
            assert seen == [1, -1, 2]
    assert Step.__call__.__doc__ == "Notes a number."


async def test_what_was_taken_over_is_left_with_the_other() -> None:
    seen: list[str] = []
    async with Unwinding() as entered:
        async with Unwinding() as others:
            for each in steps(seen, "pp"):
                await others.enter(each)
            entered.take_over(others)
        assert seen == ["in 0p", "in 1p"]
    assert seen[2:] == ["out 1p", "out 0p"]


async def test_sources_are_closed_and_what_has_no_end_is_left_alone() -> None:
    seen: list[str] = []

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            seen.append("closed")

    events = source()
    async with Unwinding() as entered:
        entered.close(events)
        entered.close(object())
        assert await anext(events) == 1
    assert seen == ["closed"]
