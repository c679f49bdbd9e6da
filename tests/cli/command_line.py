"""Runs `headrace` as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.cli.main import main


def clean_environment(folder: Path, **more: str) -> dict[str, str]:
    """An environment without anything of ours, and a home and cache below `folder`."""
    ours = ("HEADRACE_", "MODEL_PATH", "API_PORT", "MAX_WORKERS", "LOG_LEVEL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "HOME": str(folder), "HEADRACE_CACHE": str(folder / "cache"), "COLUMNS": "200", **more}


@dataclass(frozen=True)
class Finished:
    """As `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class QuickCli:
    """In this process: what takes a second a start is worth it only where the process itself matters."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: str, env: dict[str, str] | None = None) -> Finished:
        with self.monkeypatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["headrace", *words])
            wanted = clean_environment(self.folder, **(env or {}))
            for name in os.environ.keys() - wanted.keys():
                patch.delenv(name)
            for name, value in wanted.items():
                patch.setenv(name, value)
            self.capsys.readouterr()
            with pytest.raises(SystemExit) as left:
                main()
        out, err = self.capsys.readouterr()
        code = left.value.code
        return Finished(code if isinstance(code, int) else 0, out, err)


@dataclass(frozen=True)
class Cli:
    folder: Path

    def __call__(self, *words: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "headrace", *words],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env=clean_environment(self.folder, **(env or {})),
            check=False,
        )
