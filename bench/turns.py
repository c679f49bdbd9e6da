"""A side in a process of its own that is asked in turn: one JSON line in, one out. While nobody asks, it waits for its input."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from bench.servers import ServerFailed, clean_environment, cpu_seconds

_ROOT = Path(__file__).parent.parent


class Asked:
    """The asking end."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process
        self.ready: dict[str, Any] = self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Raises `ServerFailed` if the side dies or says that it failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its status says more
        return self._answer()

    def cpu_seconds(self) -> float:
        return cpu_seconds(self._process.pid)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ServerFailed(f"{self.name} ended with status {self._process.wait()}; what it said is above.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ServerFailed(f"{self.name}: {answer['error']}")
        return answer


@contextmanager
def side(name: str, module: str, **arguments: Any) -> Iterator[Asked]:
    """Start `python -m MODULE ARGUMENTS-AS-JSON` and wait until it is ready."""
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=_ROOT, env=clean_environment()) as process:
        try:
            yield Asked(name, process)
        finally:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def speed(asked: Asked, answer: dict[str, Any], tokens: int) -> float:
    """Tokens a second. Raises `ServerFailed` unless exactly `tokens` were made: less work done is not speed."""
    if answer["tokens"] != tokens:
        raise ServerFailed(f"{asked.name} was asked for {tokens} tokens and gave {answer['tokens']}.")
    return float(tokens / answer["seconds"])


def answer_in_turn(answer: Callable[[dict[str, Any]], dict[str, Any]], source: IO[str], sink: IO[str], ready: dict[str, Any]) -> None:
    """The answering end: until the input closes. Libraries that print must not reach `sink`."""
    sink.write(json.dumps(ready) + "\n")
    sink.flush()
    for line in source:
        sink.write(json.dumps(answer(json.loads(line))) + "\n")
        sink.flush()


@contextmanager
def own_stdout() -> Iterator[IO[str]]:
    """The real standard output for answers, with file descriptor 1 led to standard error for everything else."""
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "w") as sink:
        yield sink
