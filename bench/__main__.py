"""Runs benchmarks one after another and keeps their results: `python -m bench [NAME …]`.

A benchmark is a module of this folder with a docstring and `main() -> str`, which returns its table in Markdown and prints how far
it is on standard error. Each runs in a process of its own, so that none leaves threads or memory to the next.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

from bench.results import append

FOLDER = Path(__file__).parent
_RUN = "import sys; from importlib import import_module; sys.stdout.write(import_module(sys.argv[1]).main())"


def benchmarks() -> dict[str, str]:
    """Every module here that defines `main`, with its docstring's first line, by name; read, not imported."""
    found: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if path.stem.startswith("_") or "main" not in defined:
            continue
        found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> int:
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run benchmarks one after another.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all without any")
    parser.add_argument("--list", action="store_true", help="list them and leave")
    parser.add_argument("--dry", action="store_true", help="print the results, and leave RESULTS.md as it is")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in known]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there is {', '.join(known) or 'none yet'}")
    if asked.list:
        for name, purpose in known.items():
            print(f"{name:<20} {purpose}")
        return 0
    failed = [name for name in asked.names or known if not run(name, keep=not asked.dry)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, *, keep: bool) -> bool:
    """Run one benchmark; False if it failed."""
    print(f"== {name}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _RUN, f"bench.{name}"], stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent, check=False)
    if done.returncode != 0:
        return False
    print(done.stdout)
    if keep:
        append(name, f"python -m bench {name}", done.stdout, seconds=time.monotonic() - begun)
    return True


if __name__ == "__main__":
    sys.exit(main())
