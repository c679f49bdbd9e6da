"""A floor imports only the floors below it, and the wings of floor 1 never import each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "headrace"

FLOORS: dict[str, int] = {
    "types": 0,
    "records": 0,
    "call": 0,
    "unwinding": 0,
    "claims": 0,
    "waiting": 0,
    "errors": 0,
    "ports": 0,
    "config": 0,
    "served": 0,
    "logs": 0,
    "error_tracking": 0,
    "engine": 1,
    "models": 1,
    "stores": 1,
    "policies": 1,
    "journey": 2,
    "engine_deaths": 2,
    "engine_streams": 2,
    "engines": 2,
    "quarantine": 2,
    "supervisor": 2,
    "children": 2,
    "control": 2,
    "api_processes": 2,
    "reload": 2,
    "engine_places": 2,
    "engine_yard": 2,
    "fleet": 2,
    "golden": 2,
    "replicas": 2,
    "stables": 2,
    "upgrades": 2,
    "words_later": 2,
    "stalls": 2,
    "low_priority": 2,
    "huge_pages": 2,
    "circuits": 2,
    "lineup": 2,
    "address": 2,
    "alerts": 2,
    "alert_webhook": 2,
    "tls": 2,
    "tracing": 2,
    "worker": 2,
    "http": 3,
    "console": 3,
    "app": 4,
    "cli": 4,
    "ray_app": 4,
    "__main__": 4,
}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the module in full"
            found.append((node.lineno, node.module or ""))
            if node.module == "headrace":
                found += [(node.lineno, f"headrace.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "headrace"]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_floor(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own == "__init__":
        assert imports(path) == []
        return
    assert own in FLOORS, f"{own} is on no floor; add it to FLOORS and to ARCHITECTURE.md"
    for line, name in imports(path):
        other = part(name)
        if other in ("", own, "__version__"):
            continue
        assert FLOORS[other] < FLOORS[own] or (FLOORS[other] == FLOORS[own] and FLOORS[own] not in (1,)), (
            f"{path.name}:{line}: {own} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})"
        )


def test_the_architecture_names_what_there_is() -> None:
    page = (SOURCE.parents[1] / "ARCHITECTURE.md").read_text()
    files = {
        name for name in re.findall(r"`([\w/]+\.py)`", page) if not (SOURCE / name).exists() and not (SOURCE.parents[1] / name).exists()
    }
    assert not files, files
    rows = {int(number): set(re.findall(r"`(\w+)/?`", row)) for number, row in re.findall(r"^\| (\d) [^|]*\|(.*)\|$", page, re.MULTILINE)}
    for module, floor in FLOORS.items():
        if module != "__main__" and ((SOURCE / module).is_dir() or (SOURCE / f"{module}.py").exists()):
            assert module in rows[floor], f"{module} is not on floor {floor} of ARCHITECTURE.md"
