"""The Dockerfile, without a container engine: its install and start commands in a fresh folder and virtual environment."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continuation lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1].strip()) for line in joined.splitlines()]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in DOCKERFILE if instruction == name]


def declared_environment() -> dict[str, str]:
    return dict(word.split("=", 1) for line in arguments("ENV") for word in shlex.split(line))


def test_the_image_is_slim_unprivileged_and_keeps_models_and_data_in_volumes() -> None:
    assert arguments("FROM")[0].endswith("-slim")
    assert arguments("USER")[-1] not in ("root", "0")
    assert arguments("VOLUME") == [declared_environment()[name] for name in ("HEADRACE_CACHE", "HEADRACE_DATA_DIR")]
    assert arguments("EXPOSE") == ["8000"]
    steps = [instruction for instruction, _ in DOCKERFILE]
    assert steps.index("USER") < steps.index("ENTRYPOINT")


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in arguments("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


def test_compose_serves_the_image_with_the_tutorials_variables() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["headrace"]
    assert {"MODEL_PATH", "MAX_WORKERS", "LOG_LEVEL"} <= set(service["environment"])
    assert service["volumes"] == [
        f"{volume}:{declared_environment()[name]}" for volume, name in (("models", "HEADRACE_CACHE"), ("data", "HEADRACE_DATA_DIR"))
    ]
    assert service["ports"][0].endswith(":8000")
    assert service["ports"][0].startswith("${PUBLISH_ON:-127.0.0.1}"), "without keys only this machine may reach it"
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.slow
def test_its_install_and_start_commands_serve_and_stop(tmp_path: Path) -> None:
    folder, venv = tmp_path / "app", tmp_path / "venv"
    folder.mkdir()
    for line in arguments("COPY"):
        *sources, _ = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, folder)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "PYTHON"))}
    path = f"{venv / 'bin'}{os.pathsep}{outside['PATH']}"
    # pip's own cache is of use to a test, and the user's models spare it a download.
    image = {name: value for name, value in declared_environment().items() if name not in ("HEADRACE_CACHE", "PIP_NO_CACHE_DIR")}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    environment = outside | image | {"PATH": path, "VIRTUAL_ENV": str(venv), "API_PORT": port, "HEADRACE_API_KEYS": "a-key"}
    environment["HEADRACE_DATA_DIR"] = str(tmp_path / "data")
    # Of the thousands of modules that are installed a start needs a few hundred.
    environment["PIP_COMPILE"] = "0"
    for name in ("HEADRACE_CACHE", "HEADRACE_CACHE_DIR"):
        if name in os.environ:
            environment[name] = os.environ[name]

    installs = [command for command in arguments("RUN") if command.startswith("pip ")]
    assert installs, "the Dockerfile installs the package with pip"
    for command in installs:
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    start = json.loads(arguments("ENTRYPOINT")[0])
    check = json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(start, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        until = time.monotonic() + 300
        while subprocess.run(check, env=environment, capture_output=True, check=False).returncode != 0:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert subprocess.run(check, env=environment, capture_output=True, check=False).returncode != 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_without_keys_the_image_refuses_to_start_and_says_what_to_do(tmp_path: Path) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    command = [sys.executable, "-m", "headrace", *json.loads(arguments("ENTRYPOINT")[0])[1:]]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=outside | declared_environment() | {"HEADRACE_CACHE": str(tmp_path), "HEADRACE_DATA_DIR": str(tmp_path), "API_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "HEADRACE_API_KEYS" in done.stderr
