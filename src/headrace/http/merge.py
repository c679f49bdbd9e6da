"""Several calls of one request, run side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first error ends the others and is raised, and so does a cancellation."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _end(tasks)


async def merge(sources: Sequence[AsyncGenerator[bytes]]) -> AsyncGenerator[bytes]:
    """Pieces of all sources as they come, once each has given its first: a refusal of one refuses them all.

    The first error ends the others and is raised.
    """
    arrived: asyncio.Queue[tuple[int, bytes | BaseException | None]] = asyncio.Queue(maxsize=4 * len(sources))

    async def pump(number: int, source: AsyncGenerator[bytes]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    await arrived.put((number, piece))
        except Exception as error:  # noqa: BLE001 - it travels to the task that reads the queue, and is raised there
            await arrived.put((number, error))
        else:
            await arrived.put((number, None))

    tasks = [asyncio.create_task(pump(number, source)) for number, source in enumerate(sources)]
    try:
        running, silent, held = len(sources), set(range(len(sources))), bytearray()
        while running:
            number, piece = await arrived.get()
            silent.discard(number)
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                running -= 1
            elif silent:
                held += piece
            else:
                yield bytes(held) + piece
                held.clear()
        if held:
            yield bytes(held)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
