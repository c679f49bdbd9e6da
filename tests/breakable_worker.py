"""An engine worker over the fake model, which a test can break by files in the folder that BREAKABLE names.

Run in place of `headrace.worker`. `hang` makes the next step never end, `block` the event loop never turn again (each is removed as it
takes effect, so the next process is well); `slow` makes steps take and be expected to take so many seconds; while `broken` is there the
model can't be loaded.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from fake_runner import FakeResult, FakeRunner, LetterTokenizer

from headrace import worker
from headrace.config import Config
from headrace.engine import scheduled
from headrace.engine.stepper import Stepper
from headrace.errors import ModelError
from headrace.ports import Deliver, Engine, ForwardBatch
from headrace.types import GenerateRequest, ModelFiles

FOLDER = Path(os.environ["BREAKABLE"])
FOREVER = 3600.0


class BreakableRunner(FakeRunner):
    def forward(self, batch: ForwardBatch) -> FakeResult:
        if _takes_effect("hang"):
            time.sleep(FOREVER)
        time.sleep(_slow() or 0.005)
        return super().forward(batch)


class BreakableEngine(scheduled.ScheduledEngine):
    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        if _takes_effect("block"):
            time.sleep(FOREVER)
        super().submit(request, deliver)


def _takes_effect(name: str) -> bool:
    try:
        (FOLDER / name).unlink()
    except FileNotFoundError:
        return False
    return True


def _slow() -> float:
    path = FOLDER / "slow"
    return float(path.read_text()) if path.exists() else 0.0


def _learn(stepper: Stepper) -> None:
    """In place of the warm-up, which would take long with slow steps."""
    for tokens in range(1, 9):
        stepper._pace.note(tokens, _slow() or 0.005)


def _build(files: ModelFiles, config: Config, *arguments: Any, **named: Any) -> Engine:
    if (FOLDER / "broken").exists():
        raise ModelError("The model's file is gone.")
    return BreakableEngine(
        lambda: BreakableRunner(num_blocks=512),
        LetterTokenizer,
        name=files.name,
        kind="fake",
        context_length=1500,
        fingerprint="f",
        config=config.engine,
    )


if __name__ == "__main__":
    worker.build_engine = _build
    scheduled.warm_up = _learn
    worker.main()
