"""What the supervisor and its children say to each other, and how a child begins: the lifeline.

Each child holds one end of a socket pair, whose other end only the supervisor has. It brings the configuration (secrets
don't belong on a command line), then commands; the child reports its state. Its end is the supervisor's
death, upon which the child leaves at once, whatever it is doing.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from pydantic import SecretStr

from headrace.claims import Ask, Reply
from headrace.config import Config
from headrace.policies.alert_rules import RequestCounts
from headrace.policies.turn_table import TurnMove, TurnWord
from headrace.records import BudgetPeriod, TrackedError
from headrace.types import CircuitState, EngineState, EngineStats, EngineStatus, ModelFiles


class ServedHere(msgspec.Struct, frozen=True):
    """One of several models, for an API process."""

    family: str = ""
    entry: str = ""
    """JSON of its section in the configuration, with what it has from [models.NAME], without secrets; empty where it has none."""
    replicas: list[str] = []
    """Paths of further workers that serve it."""


class Setup(msgspec.Struct, frozen=True, tag=1):
    """The first message: everything the child needs to begin."""

    config: str
    """JSON of `Config`, secrets included."""
    models: list[ModelFiles]
    sockets: list[str]
    """For an API process: the path of each model's worker."""
    started_at: float
    """`time.monotonic()` of the whole server's start."""
    memory_share: float = 1.0
    """For a worker: its part of the memory that keys and values may take, where several models are served."""
    pulse: str = ""
    """For a worker: the file by which the supervisor sees that it gets on (`engine.pulse`)."""
    standing_by: bool = False
    """For a worker: load, and accept nobody before `Promote`."""
    in_hurry: bool = False
    """For a worker that stands by: it will be needed soon, so it doesn't give way to the one that serves."""
    beside_standby: bool = False
    """For a worker: memory is needed for a second one like it."""
    served: list[ServedHere] = []
    """For an API process, where there are several models: more on each of `models`, in their order."""
    current: dict[str, str] = {}
    """Likewise: by family, the version that the bare name stands for."""
    kv_blocks: int = 0
    """For a worker that stands by: KV blocks to allocate, as many as the one has that it will replace; 0 where that isn't known."""


class EngineChanged(msgspec.Struct, frozen=True, tag=2):
    """To API processes: where the worker of that model is in its life."""

    model: str
    status: EngineStatus


class Drain(msgspec.Struct, frozen=True, tag=3):
    """To API processes: let what runs finish, end it after `timeout` seconds, and leave."""

    timeout: float
    replaced: bool = False
    """Others go on serving at the same address; otherwise the server stops."""


class Stop(msgspec.Struct, frozen=True, tag=4):
    """To workers: free everything and leave."""


class Promote(msgspec.Struct, frozen=True, tag=20):
    """To a worker that stands by: the other one is gone, serve."""


class Processes(msgspec.Struct, frozen=True, tag=5):
    """The answer to `AskProcesses`."""

    number: int
    listing: dict[str, Any]


# Child to supervisor


class Alive(msgspec.Struct, frozen=True, tag=6):
    """Where the child is in its life; from a worker also how its loop is doing."""

    state: EngineState
    reason: str = ""
    stats: EngineStats | None = None
    fatal: bool = False
    """Trying again can't help: the model or the configuration is at fault."""


class AskProcesses(msgspec.Struct, frozen=True, tag=7):
    """From an API process, on behalf of `headrace ps`."""

    number: int


class AskLimits(msgspec.Struct, frozen=True, tag=8):
    """From an API process: do this with the limits that all share, which the supervisor keeps."""

    number: int
    asks: list[Ask]


class LimitsAnswer(msgspec.Struct, frozen=True, tag=9):
    """To an API process: a reply to each of the asks."""

    number: int
    replies: list[Reply]


class CircuitCalls(msgspec.Struct, frozen=True, tag=10):
    """From an API process: calls of a model's engine that are over, and how many of them failed."""

    model: str
    epoch: int
    calls: int
    failures: int


class CircuitChanged(msgspec.Struct, frozen=True, tag=11):
    """To API processes: how a model's circuit breaker stands."""

    model: str
    state: CircuitState
    epoch: int
    wait: float
    """Seconds until probes are let through, if it is open."""


class AskProbe(msgspec.Struct, frozen=True, tag=12):
    """From an API process: may a request try the engine of that model?"""

    number: int
    model: str


class ProbeAnswer(msgspec.Struct, frozen=True, tag=13):
    """The answer to `AskProbe`."""

    number: int
    probe: int | None


class ProbeEnded(msgspec.Struct, frozen=True, tag=14):
    """From an API process: what a probe found; None: nothing."""

    model: str
    probe: int
    succeeded: bool | None


class Quarantine(msgspec.Struct, frozen=True, tag=30):
    """From an API process, and on to all of them: requests that look like this kill the model's engine."""

    model: str
    fingerprint: bytes
    until: float
    """Unix time."""


class KeyMet(msgspec.Struct, frozen=True, tag=31):
    """From an API process, and on to all of them: a key of the store is in use, so that each of them knows it should the store go away."""

    digest: bytes
    """Of its secret, under the pepper; what the key may do each process asks the store itself."""


class Quiet(msgspec.Struct, frozen=True, tag=50):
    """From an API process that leaves: it takes no new connections any more, or, where the server stops, nothing that ran is left, and
    what comes is refused."""


class CloseDoor(msgspec.Struct, frozen=True, tag=51):
    """To API processes, when all are quiet: no new connections are let in; answer those that are queued, and leave."""


class AskReload(msgspec.Struct, frozen=True, tag=52):
    """From an API process: read the configuration again."""

    number: int


class Reloaded(msgspec.Struct, frozen=True, tag=53):
    """The answer to `AskReload`."""

    number: int
    changed: list[str] = []
    """Settings that are different now, by their flat names."""
    refused: str = ""
    """Why the new configuration isn't taken, if it isn't."""


class ErrorsNoted(msgspec.Struct, frozen=True, tag=40):
    """From any child: errors that it met, for the error book, which the supervisor keeps."""

    errors: list[TrackedError]


class RequestsEnded(msgspec.Struct, frozen=True, tag=70):
    """From an API process, now and then: requests that are over, for the alerts."""

    counts: list[RequestCounts]


class BudgetSeen(msgspec.Struct, frozen=True, tag=71):
    """From an API process: so much of a budget is spent; said when it comes to be nearly spent, and when it is so no more."""

    subject: str
    budget: int
    spent: int
    period: BudgetPeriod


class Hold(msgspec.Struct, frozen=True, tag=80):
    """To API processes: hand that model's worker no requests any more; answered by `Held`."""

    model: str
    number: int
    gently: bool
    """Only if there are none now."""


class Held(msgspec.Struct, frozen=True, tag=81):
    """From an API process: the model's worker has nothing of ours any more; or, not `done`, it has, and the hold was gentle."""

    model: str
    number: int
    done: bool


class Release(msgspec.Struct, frozen=True, tag=82):
    """To API processes: hand requests to the model's worker again, once there is one."""

    model: str


class ModelInUse(msgspec.Struct, frozen=True, tag=83):
    """From an API process: it has requests for that model, or has none any more."""

    model: str
    in_use: bool


class ModelKnown(msgspec.Struct, frozen=True, tag=84):
    """To API processes: a model was fetched."""

    files: ModelFiles


class ModelRefusal(msgspec.Struct, frozen=True, tag=85):
    """To API processes: the model can't be loaded; requests that wait for it end with this error."""

    model: str
    code: str
    reason: str


class VersionPromoted(msgspec.Struct, frozen=True, tag=86):
    """To API processes: the family's name stands for that model from now on."""

    family: str
    model: str


ModelsAction = Literal["list", "show", "load", "unload", "promote", "rollback"]


class AskModels(msgspec.Struct, frozen=True, tag=87):
    """From an API process, for an administrator: list the models, show one, or do something with one."""

    number: int
    action: ModelsAction = "list"
    model: str = ""
    watch: float | None = None
    """Of `promote`: seconds to watch the new version."""


class ModelsAnswer(msgspec.Struct, frozen=True, tag=88):
    """The answer to `AskModels`."""

    number: int
    said: dict[str, Any] = {}
    refused: str = ""
    """Why it wasn't done, if it wasn't."""
    unknown: bool = False
    """There is no such model."""


class ShadowCompared(msgspec.Struct, frozen=True, tag=89):
    """From an API process: how the answer of a model that got a copy of a request compares to the one that was given."""

    model: str
    shadow: str
    likeness: float
    """0 to 1; -1: it failed."""


class TurnMoves(msgspec.Struct, frozen=True, tag=90):
    """From an API process: answers that it would make, or is making, or has made; by key, and by a number of its own."""

    moves: list[tuple[bytes, int, TurnMove]]


class TurnWords(msgspec.Struct, frozen=True, tag=91):
    """To an API process: words on its moves."""

    words: list[tuple[bytes, int, TurnWord]]


ToChild = (
    Setup
    | TurnWords
    | Hold
    | Release
    | ModelKnown
    | ModelRefusal
    | VersionPromoted
    | ModelsAnswer
    | EngineChanged
    | Drain
    | Stop
    | Promote
    | Processes
    | LimitsAnswer
    | CircuitChanged
    | ProbeAnswer
    | Quarantine
    | KeyMet
    | CloseDoor
    | Reloaded
)
ToSupervisor = (
    Alive
    | TurnMoves
    | Held
    | ModelInUse
    | AskModels
    | ShadowCompared
    | AskProcesses
    | AskLimits
    | CircuitCalls
    | AskProbe
    | ProbeEnded
    | Quarantine
    | KeyMet
    | ErrorsNoted
    | RequestsEnded
    | BudgetSeen
    | Quiet
    | AskReload
)


def config_to_json(config: Config) -> str:
    """The whole configuration with its secrets, for `Config.model_validate_json` in a child."""
    return json.dumps(config.model_dump(), default=_plain)


def _plain(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a child process was started with."""

    control: socket.socket
    listening: socket.socket
    setup: Setup
    config: Config


def begin() -> Beginning:
    """The first thing a child does: cut itself off from the terminal, hold on to the lifeline, read its setup.

    The command line is the file descriptors of the control socket and of the listening socket.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # Service managers and terminals signal whole groups; only the supervisor ends a child.
        signal.signal(number, signal.SIG_IGN)
    control_fd, listening_fd = (int(argument) for argument in sys.argv[1:3])
    control = socket.socket(fileno=control_fd)
    leave_with(control)
    control.setblocking(True)
    setup = msgspec.msgpack.decode(_read_frame(control), type=Setup)
    control.setblocking(False)
    return Beginning(control, socket.socket(fileno=listening_fd), setup, Config.model_validate_json(setup.config))


def leave_with(control: socket.socket) -> None:
    """Exit at once when the other end of `control` closes, also while native code keeps the event loop waiting."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    threading.Thread(target=_wait_for_end, args=(control.fileno(),), name="lifeline", daemon=True).start()


def _wait_for_end(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP is always reported
    while not any(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, events in poll.poll()):
        pass
    os._exit(0)


def _read_frame(control: socket.socket) -> bytes:
    """One frame as `engine.frames` writes them."""
    return _read(control, int.from_bytes(_read(control, 4), "big"))


def _read(control: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = control.recv(size - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return bytes(data)
