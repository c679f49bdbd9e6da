"""The Python environment that converts Transformers models: made in the cache folder on first use, with its own packages.

optimum-intel wants an older transformers than serving with it does, and torch is large; neither belongs into the
environment that serves.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from headrace.errors import ModelError
from headrace.models.cache import Cache
from headrace.models.progress import Progress

REQUIREMENTS = ("optimum-intel[openvino]==2.2.0", "torch==2.13.0")
_SIZE = 3 * 10**9


def converting_python(cache: Cache, progress: Progress, *, offline: bool) -> Path:
    """The environment's interpreter. Blocks for minutes the first time. Raises `ModelError`."""
    key = hashlib.sha256("\0".join((*REQUIREMENTS, sys.version)).encode()).hexdigest()[:16]
    folder = cache.root / "convert" / key
    python = folder / "bin" / "python"
    done = folder / "complete"
    if done.is_file():
        return python
    if importlib.util.find_spec("virtualenv") is None:
        raise ModelError(
            "Converting a Transformers model needs the extra: `pip install 'headrace[convert]'`. "
            "Or serve an OpenVINO folder or a GGUF file of the model, which need nothing more."
        )
    if offline:
        raise ModelError(
            "Converting a Transformers model downloads packages the first time, and `offline` is set. Convert it once while online."
        )
    with cache.lock(f"convert-{key}"):
        if done.is_file():
            return python
        cache.need_space(_SIZE, "The environment for conversions")
        log = cache.root / "convert" / f"{key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with progress.spinner(f"Making an environment for conversions (once, about {_SIZE / 1e9:.0f} GB; log: {log})"):
            run_logged([sys.executable, "-m", "virtualenv", "--clear", "--no-periodic-update", str(folder)], log, "Making the environment")
            command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *REQUIREMENTS]
            run_logged(command, log, "Installing optimum-intel and torch")
            # It comes along for images, which aren't converted here, and where an index holds torch without CUDA its own
            # build is of another kind; transformers then fails to import, without it does not.
            run_logged([str(python), "-m", "pip", "uninstall", "--yes", "torchvision"], log, "Removing torchvision")
        done.touch()
    return python


def run_logged(command: list[str], log: Path, what: str, environment: dict[str, str] | None = None) -> None:
    """Run to its end, output to the log file. Raises `ModelError` with the last lines and the log's place."""
    with log.open("ab") as output:
        # Our interpreter's own settings are none of the other environment's business.
        inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=inherited | (environment or {}), check=False
        )
    if ran.returncode != 0:
        last = log.read_bytes()[-2000:].decode("utf-8", "replace").strip().splitlines()[-3:]
        raise ModelError(f"{what} failed (exit status {ran.returncode}): {' '.join(last)[:600]}. The whole output is in {log}.")
