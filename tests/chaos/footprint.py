"""What a server's processes hold: open files, threads, tasks, memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.witness import Witness
from running_server import eventually

FILES, THREADS, TASKS = 10, 6, 4
"""So many more than before may be there: pools of connections and of threads that had no need to grow yet."""
MEMORY = 48
"""MiB."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """One process's."""

    kind: str
    pid: int
    files: int
    threads: int
    tasks: tuple[str, ...]
    memory: float

    @classmethod
    def of(cls, kind: str, pid: int, witness: Witness) -> Footprint:
        folder = Path(f"/proc/{pid}")
        tasks = eventually(lambda: [found] if (found := witness.tasks(pid)) is not None else [], what=f"the tasks of {kind} {pid}")[0]
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return cls(
            kind,
            pid,
            files=len(list((folder / "fd").iterdir())),
            threads=int(status["Threads"]),
            tasks=tuple(tasks),
            memory=int(status["VmRSS"].split()[0]) / 1024,
        )

    def __str__(self) -> str:
        return f"{self.kind} {self.pid}: {self.files} files, {self.threads} threads, {len(self.tasks)} tasks, {self.memory:.0f} MiB"


def footprints(listing: dict[str, Any], witness: Witness) -> list[Footprint]:
    """Of all processes that the server lists."""
    found = [Footprint.of("supervisor", listing["supervisor"]["pid"], witness)]
    for kind, lines in (("api", listing["api"]), ("worker", listing["workers"])):
        found += [Footprint.of(kind, line["pid"], witness) for line in lines]
    return found


def grown(before: list[Footprint], after: list[Footprint]) -> list[str]:
    """What holds more than the largest of its kind did."""
    findings = []
    for now in after:
        then = [each for each in before if each.kind == now.kind]
        most = max(each.files for each in then), max(each.threads for each in then), max(each.memory for each in then)
        if now.files > most[0] + FILES:
            findings.append(f"{now} (files: {most[0]} before)")
        if now.threads > most[1] + THREADS:
            findings.append(f"{now} (threads: {most[1]} before)")
        if now.memory > most[2] + MEMORY:
            findings.append(f"{now} (memory: {most[2]:.0f} MiB before)")
        tasks = max((each.tasks for each in then), key=len)
        if len(now.tasks) > len(tasks) + TASKS:
            more = Counter(now.tasks) - Counter(tasks)
            findings.append(f"{now} (tasks: {len(tasks)} before; more are {dict(more)})")
    return findings
