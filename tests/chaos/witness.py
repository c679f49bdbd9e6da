"""An account of what engines made, kept by nobody who bills: each worker of the echo engine writes down every token before it leaves.

It is brought into the server's processes as `sitecustomize`. There it also makes a process leave at its start while the file
`refuse-worker` or `refuse-api` is there, and list its tasks when it gets SIGUSR2.
"""

from __future__ import annotations

import os
import re
import signal
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

MARK = re.compile(r"<(\d+\.\d+)>")
"""What every prompt begins with: who asks it, and their how many-th it is."""

SITE = r"""
import os
import sys

folder = os.environ.get("CHAOS_FOLDER")
role = {"headrace.worker": "worker", "headrace.app": "api", "headrace": "supervisor"}.get((sys.orig_argv + [""] * 4)[
    sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else -1
])
if folder and role:
    if os.path.exists(os.path.join(folder, "refuse-" + role)):
        os._exit(3)

    import signal

    def list_tasks(number, frame):
        import asyncio
        path = os.path.join(folder, "tasks-%d" % os.getpid())
        names = sorted(task.get_name() + " " + task.get_coro().__qualname__ for task in asyncio.all_tasks())
        with open(path + ".new", "w") as file:
            file.write("\n".join(names))
        os.rename(path + ".new", path)

    signal.signal(signal.SIGUSR2, list_tasks)

if folder and role == "worker":
    import re
    from headrace.engine import echo

    account = os.open(os.path.join(folder, "made-%d" % os.getpid()), os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC)
    mark = re.compile(rb"<(\d+\.\d+)>")
    submit, step, end = echo.EchoEngine.submit, echo._Sequence.step, echo.EchoEngine._end

    def write(*words):
        os.write(account, (" ".join(map(str, words)) + "\n").encode())

    def submit_noted(self, request, deliver):
        submit(self, request, deliver)
        said = mark.search(bytes(token for token in request.prompt if token < 256))
        write("asked", request.id, len(request.prompt), said[1].decode() if said else "-")

    def step_noted(self, now):
        before = self.index
        step(self, now)
        if self.index > before:
            write("made", self.job.request.id, self.choice, before)

    def end_noted(self, job, error):
        if job.request.id in self._jobs:
            write("ended", job.request.id)
        end(self, job, error)

    echo.EchoEngine.submit = submit_noted
    echo._Sequence.step = step_noted
    echo.EchoEngine._end = end_noted
"""


@dataclass(slots=True)
class Made:
    """What engines made for one request. `tokens`: (choice, index), each once, however often it was made."""

    mark: str = "-"
    prompt: int = 0
    tokens: set[tuple[int, int]] = field(default_factory=set)
    workers: set[int] = field(default_factory=set)
    ended: bool = False
    """By the last worker, in order."""


class Witness:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sitecustomize.py").write_text(SITE)

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(self.folder), "CHAOS_FOLDER": str(self.folder)}

    def account(self) -> dict[str, Made]:
        """By request id."""
        made: defaultdict[str, Made] = defaultdict(Made)
        # In the order of their making: a worker that goes on with a request was started later, or waited until then.
        for path in sorted(self.folder.glob("made-*"), key=lambda path: path.stat().st_mtime_ns):
            pid = int(path.name.removeprefix("made-"))
            for line in path.read_text().splitlines():
                what, id, *rest = line.split(" ")
                entry = made[id]
                entry.workers.add(pid)
                entry.ended = what == "ended"
                if what == "asked":
                    entry.prompt, entry.mark = int(rest[0]), rest[1]
                elif what == "made":
                    entry.tokens.add((int(rest[0]), int(rest[1])))
        return dict(made)

    def tasks(self, pid: int) -> list[str] | None:
        """Those of a process; None until it has answered. Ask again."""
        path = self.folder / f"tasks-{pid}"
        if path.exists():
            listed = path.read_text().splitlines()
            path.unlink()
            return listed
        os.kill(pid, signal.SIGUSR2)
        return None

    def processes(self) -> list[int]:
        """All that live with our environment: the server's, and theirs."""
        ours = f"CHAOS_FOLDER={self.folder}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (
                    ours in (path / "environ").read_bytes().split(b"\0")
                    and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                ):
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def refuse(self, role: str, *, begin: bool) -> None:
        """Whether processes of that role leave at their start, from now on."""
        path = self.folder / f"refuse-{role}"
        if begin:
            path.touch()
        else:
            path.unlink(missing_ok=True)
