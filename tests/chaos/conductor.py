"""Does what a schedule says to a running server, and notes what was done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from chaos.gate import Gate
from chaos.schedule import Fault
from chaos.witness import Witness
from headrace.stalls import is_stopped
from real_servers import RealServer
from running_server import RunningServer, alive, eventually

WITHIN = 30.0
"""Seconds in which a process that is to be hit has to be there."""


class Conductor:
    """`stores`: by target, each with the gate in front of it."""

    def __init__(self, server: RunningServer, witness: Witness, stores: dict[str, tuple[RealServer, Gate]]) -> None:
        self._server = server
        self._witness = witness
        self._stores = stores
        self._one_at_a_time = defaultdict(threading.Lock)
        self.done: list[str] = []
        """An account of what was done."""
        self.api_deaths: list[float] = []
        """`time.monotonic()` of when an API process was killed."""
        self.troubles: list[str] = []
        """What could not be done."""

    def conduct(self, faults: list[Fault], began: float) -> None:
        """Do them all, each at its time, and wait until the last is over."""
        threads = []
        for fault in faults:
            time.sleep(max(0.0, began + fault.at - time.monotonic()))
            thread = threading.Thread(target=self._do, args=(fault, began), name=str(fault), daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self.troubles.append(f"{thread.name} doesn't end")

    def _do(self, fault: Fault, began: float) -> None:
        # Stores are put out of order and back in it one thing after another.
        with self._one_at_a_time[fault.target] if fault.target in self._stores else contextlib.nullcontext():
            begun = time.monotonic() - began
            try:
                hit = self._to_store(fault) if fault.target in self._stores else self._to_process(fault)
            except (AssertionError, OSError) as error:
                self.troubles.append(f"{fault}: {type(error).__name__}: {error}")
                hit = "could not be done"
            self.done.append(f"{fault}  [{begun:.2f} to {time.monotonic() - began:.2f} s: {hit}]")

    # Stores

    def _to_store(self, fault: Fault) -> str:
        store, gate = self._stores[fault.target]
        with self._out_of_order(fault, store, gate):
            time.sleep(fault.lasts)
        return "back"

    @contextlib.contextmanager
    def _out_of_order(self, fault: Fault, store: RealServer, gate: Gate) -> Iterator[None]:
        begin: dict[str, Callable[[], None]] = {
            "kill": store.kill,
            "stop": store.stop,
            "pause": store.pause,
            "slow": lambda: gate.turn("delay", 0.005 + 0.2 * fault.strength),
            "refuse": lambda: gate.turn("refuse"),
            "swallow": lambda: gate.turn("swallow"),
        }
        end: dict[str, Callable[[], None]] = {"kill": store.start, "stop": store.start, "pause": store.resume}
        begin[fault.deed]()
        try:
            yield
        finally:
            end.get(fault.deed, lambda: gate.turn("pass"))()

    # Processes

    def _to_process(self, fault: Fault) -> str:
        if fault.deed == "refuse":
            self._witness.refuse(fault.target, begin=True)
            try:
                hit = self._kill(fault)
                if fault.target == "worker":
                    # Without one that stands by.
                    for line in self.listing().get("workers", ()):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(line["pid"], signal.SIGKILL)
                time.sleep(fault.lasts)
            finally:
                self._witness.refuse(fault.target, begin=False)
            return hit
        if fault.deed == "kill":
            return self._kill(fault)
        pid = self._pid(fault)
        if fault.deed == "slow":
            end = time.monotonic() + fault.lasts
            with contextlib.suppress(ProcessLookupError):
                while time.monotonic() < end:
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.05 + 0.25 * fault.strength)
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(0.03)
            return f"process {pid}"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            if fault.lasts:
                time.sleep(fault.lasts)
                os.kill(pid, signal.SIGCONT)
            elif fault.target == "worker":
                # Nobody wakes it, unless it is being slowed down as well; whoever watches has to see.
                eventually(lambda: not alive(pid) or is_stopped(pid), what="the stop")
                eventually(lambda: not alive(pid) or not is_stopped(pid), within=WITHIN, what="the stopped worker's end")
        return f"process {pid}"

    def _kill(self, fault: Fault) -> str:
        pid = self._pid(fault)
        if fault.target == "api":
            self.api_deaths.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return f"process {pid}"

    def _pid(self, fault: Fault) -> int:
        def find() -> int:
            listed = self.listing()
            lines = listed.get("api" if fault.target == "api" else "workers", ())
            if fault.target == "api":
                return int(lines[fault.which % len(lines)]["pid"]) if lines else 0
            serving, *others = lines or ({},)
            line = serving if fault.target == "worker" else next(iter(others), {})
            return int(line.get("pid", 0))

        return eventually(find, within=WITHIN, what=f"a process to {fault.deed}: {fault.target}")

    def listing(self) -> dict[str, Any]:
        """What the server says of its processes; nothing, where nobody answers in time."""
        try:
            answer = httpx.get(f"{self._server.url}/admin/ps", headers=self._server.operator(), timeout=5, trust_env=False)
            told: dict[str, Any] = answer.raise_for_status().json()
        except httpx.HTTPError:
            return {}
        return told
