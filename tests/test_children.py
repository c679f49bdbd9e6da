from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from headrace.children import describe_exit, memory_mib
from headrace.config import AccessSection, Config
from headrace.control import config_to_json


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with status 0"), (3, "ended with status 3"), (-signal.SIGSEGV, "was ended by SIGSEGV"), (-signal.SIGKILL, "out of memory")],
)
def test_exits_in_words(code: int, words: str) -> None:
    assert words in describe_exit(code)


def test_memory_is_known_of_living_processes_only() -> None:
    memory = memory_mib(os.getpid())
    assert memory is not None
    assert 5 < memory < 10_000
    child = subprocess.Popen([sys.executable, "-c", ""])
    child_gone = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child_gone is not None
    assert memory_mib(child.pid) is None, "a zombie"
    child.wait()
    assert memory_mib(child.pid) is None
    assert memory_mib(0) is None


def test_children_get_the_configuration_with_its_secrets() -> None:
    config = Config(access=AccessSection(api_keys=("k1", "k2")))  # type: ignore[arg-type]
    revived = Config.model_validate_json(config_to_json(config))
    assert revived == config
    assert [key.get_secret_value() for key in revived.access.api_keys] == ["k1", "k2"]
