"""`python -m bench [NAME [OPTIONS]]`: lists the benchmarks, and runs one with its options, or all of them with their defaults.

A benchmark is a module of this folder whose `run` takes keyword arguments, which become its options, and returns `Findings`. With
`--record` the result is appended to RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from types import ModuleType

from bench.figures import Findings, as_markdown
from bench.options import parser_for
from bench.others import OthersWatch
from bench.results import append
from bench.servers import ServerFailed

NAMES = (
    "engine_vs_genai",
    "http_vs_engine",
    "vs_llama_server",
    "vs_transformers_serve",
    "vs_vllm_serve",
    "api_cpu",
    "start_to_ready",
    "fairness",
    "prefix",
    "cached_answer",
    "gateway",
    "gateway_cpu",
    "vs_litellm",
    "soak",
    "ledger_after_kills",
    "streams_survive",
    "engine_pause",
    "overload",
    "sigterm",
    "two_models",
    "upgrade_under_load",
    "model_churn",
)


def main(arguments: list[str]) -> int:
    """0: all figures met; 1: some were not; 2: something could not be measured."""
    usage = "%(prog)s [--list] [--record] | %(prog)s NAME [OPTIONS] [--record] | %(prog)s NAME --help"
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run benchmarks one after another.", usage=usage)
    parser.add_argument("name", nargs="?", choices=NAMES, help="which, with its own options; all without one")
    parser.add_argument("--list", action="store_true", help="list them and leave")
    parser.add_argument("--record", action="store_true", help="append the results to bench/RESULTS.md")
    if arguments and not arguments[0].startswith("-"):
        return _run(parser.parse_args(arguments[:1]).name, arguments[1:])
    asked = parser.parse_args(arguments)
    print("\n".join(f"{name:<22}{_summary(_module(name))}" for name in NAMES), flush=True)
    if asked.list:
        return 0
    return max(_run(name, ["--record"] if asked.record else []) for name in NAMES)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.{name}")


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def _run(name: str, arguments: list[str]) -> int:
    module = _module(name)
    parser = parser_for(module.run, prog=f"python -m bench {name}", description=module.__doc__ or "")
    options = vars(parser.parse_args(arguments))
    record = options.pop("record")
    watch = OthersWatch()
    print(f"\n{name}: {_summary(module)}", flush=True)
    begun = time.monotonic()
    try:
        findings: Findings = module.run(**options)
    except ServerFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    table = f"{as_markdown(findings)}\n\n{watch.note()}"
    print(table, flush=True)
    if record:
        given = [word for word in arguments if word != "--record"]
        append(name, " ".join(["python -m bench", name, *given]), table, seconds=time.monotonic() - begun)
    return 0 if findings.met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
