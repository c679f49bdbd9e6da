"""A key that one API process met is told to those that begin later."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any, cast

import pytest

from headrace import supervisor
from headrace.config import Config, ModelSection, StoreSection
from headrace.control import KeyMet
from headrace.lineup import lineup

pytestmark = pytest.mark.anyio


class Told:
    """Stands for an API process that has just begun."""

    pid = 1

    def __init__(self) -> None:
        self.met: list[bytes] = []

    def tell(self, message: object) -> None:
        if isinstance(message, KeyMet):
            self.met.append(message.digest)


async def test_a_process_that_begins_later_is_told_the_keys_met_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MOST_KEYS_MET", 2)
    config, members = lineup(Config(model=ModelSection(model="echo"), store=StoreSection(data_dir=tmp_path)))
    folder = tmp_path / "run"
    folder.mkdir()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        parent = supervisor.Supervisor(config, members, bound, folder, time.monotonic())
        for digest in (b"a", b"b", b"a", b"c"):
            parent._hear(cast(Any, Told()), KeyMet(digest))
        later = Told()
        parent._api_changed(cast(Any, later))
        await parent._database.close()
        for residence in parent._yard.residences.values():
            residence.close()
    assert later.met == [b"a", b"c"]
