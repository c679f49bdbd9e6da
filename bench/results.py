"""Keeps what a benchmark printed, with what it takes to judge it: machine, versions, command and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from headrace.cli import machine

RESULTS = Path(__file__).parent / "RESULTS.md"

_HEADING = "# Results\n\nAppended by `python -m bench`, newest last. Each run says on what machine and with what it was measured.\n"
_PACKAGES = ("headrace", "openvino", "openvino-genai", "tokenizers", "fastapi", "uvicorn", "msgspec", "numpy")


def surroundings() -> list[str]:
    """The machine and the versions, a line each."""
    memory = machine.memory()
    named = [
        name
        for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("BF16", "avx512_bf16"), ("AMX", "amx_tile"))
        if flag in machine.features()
    ]
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [
        f"machine: {machine.processor() or platform.machine()}, {machine.cores():g} cores, {' '.join(named)}"
        + (f", {memory.total / 2**30:.0f} GiB" if memory else ""),
        f"system: {platform.system()} {platform.release()}, Python {platform.python_version()}",
        f"versions: {', '.join(versions)}",
        f"commit: {_commit()}",
    ]


def append(name: str, command: str, output: str, *, seconds: float, to: Path = RESULTS) -> None:
    """Add one run's output, Markdown as the benchmark printed it, under its name, the date and the surroundings."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = "\n".join(f"- {line}" for line in (f"command: `{command}` ({seconds:.0f} s)", *surroundings()))
    with to.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(_HEADING)
        file.write(f"\n## {name}, {now}\n\n{facts}\n\n{output.strip()}\n")


def _commit() -> str:
    """Short id of the checked-out commit, and whether files differ from it."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()
