"""A TCP proxy in front of a store, which can be told to delay what passes, to swallow it, or to refuse connections."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Literal, Self

Mode = Literal["pass", "delay", "swallow", "refuse"]


class Gate:
    """`with Gate(port) as gate:` listens on `gate.port` and passes on to `port`, in a thread of its own."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self.port = 0
        self._mode: Mode = "pass"
        self._delay = 0.0
        self._loop = asyncio.new_event_loop()
        self._opened = asyncio.Event()
        """While what comes is passed on."""
        self._passing: set[asyncio.Task[None]] = set()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(20)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(20)

    def turn(self, mode: Mode, delay: float = 0.0) -> None:
        """From now on. `delay`: seconds that each piece is late; connections are cut when it begins to refuse."""
        done = threading.Event()

        def turned() -> None:
            self._mode, self._delay = mode, delay
            if mode == "swallow":
                self._opened.clear()
            else:
                self._opened.set()
            if mode == "refuse":
                for task in self._passing:
                    task.cancel()
            done.set()

        self._loop.call_soon_threadsafe(turned)
        assert done.wait(20)

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        self._opened.set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._over.wait()
        server.close()
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of ours: the one that asyncio made would tell of its cancellation.
        task = asyncio.create_task(self._pass_on(reader, writer))
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)
        task.add_done_callback(lambda _: writer.transport.abort())

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "refuse":
            return
        try:
            answers, behind = await asyncio.open_connection("127.0.0.1", self._behind)
        except OSError:
            return
        both = [asyncio.create_task(self._one_way(reader, behind)), asyncio.create_task(self._one_way(answers, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            behind.transport.abort()

    async def _one_way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                await self._opened.wait()
                writer.write(piece)
                await writer.drain()
