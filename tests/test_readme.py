"""Both READMEs: the same examples in the same order, which run; and the configuration table that the code has."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.config import fields
from headrace.types import ModelFiles
from running_server import RunningServer

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "README.zh-CN.md")
KEY = "my-secret-key"
ADDRESS = "http://localhost:8000"


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    code: str
    tested: bool


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[Block]:
    found = re.finditer(r"^(<!-- tested -->\n)?```(\w*)\n(.*?)^```$", text_of(name), re.DOTALL | re.MULTILINE)
    return [Block(match.group(2), match.group(3), match.group(1) is not None) for match in found]


def shape(name: str) -> list[str]:
    """Levels of headings, and table rows, in order."""
    prose = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    return [line.split(" ")[0] for line in prose.splitlines() if line.startswith(("#", "|", "- "))]


EXAMPLES = [block for block in blocks("README.md") if block.tested]


def test_both_have_the_same_examples_and_structure() -> None:
    assert blocks("README.md") == blocks("README.zh-CN.md")
    assert shape("README.md") == shape("README.zh-CN.md")


def test_the_first_commands_are_two() -> None:
    assert [line.split()[:2] for line in blocks("README.md")[0].code.splitlines()] == [["make", "serve"], ["make", "test"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_table_is_up_to_date(name: str) -> None:
    spec = importlib.util.spec_from_file_location("write_tables", ROOT / "docs" / "write_tables.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert writer.rewritten(name, text_of(name)) == text_of(name), "run `python docs/write_tables.py`"
    for field in fields():
        assert f"| `{field}` |" in text_of(name)


@pytest.mark.parametrize("name", [*NAMES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text_of(name)):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


@pytest.mark.parametrize("name", NAMES)
def test_every_endpoint_of_the_table_is_in_the_examples_server(name: str) -> None:
    named = set(re.findall(r"`(?:GET |POST )?(/[a-z0-9/_.{}]+)`", text_of(name)))
    api = (ROOT / "src" / "headrace" / "http" / "api.py").read_text()
    for path in named - {"/docs", "/openapi.json"}:
        assert f'"{path.replace("{id}", "{model:path}")}"' in api, path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, default_model: ModelFiles) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("readme")
    kept = {name: os.environ[name] for name in ("HEADRACE_CACHE", "HEADRACE_CACHE_DIR") if name in os.environ}
    with RunningServer(folder, default_model.name, environment={"HEADRACE_API_KEYS": KEY} | kept) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, server: RunningServer, tmp_path: Path) -> None:
    block = EXAMPLES[number]
    assert ADDRESS in block.code
    code = block.code.replace(ADDRESS, server.url)
    if block.language == "bash":
        # --fail-with-body makes an error status an error.
        command = ["bash", "-euo", "pipefail", "-c", code.replace("curl ", "curl --silent --show-error --fail-with-body ")]
    else:
        assert block.language == "python"
        command = [sys.executable, "-W", "error::ResourceWarning", "-c", code]
    outside = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.strip()) > 3
