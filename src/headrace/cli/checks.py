"""The checks of `headrace doctor`, one function each."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import ipaddress
import os
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from headrace.address import bind
from headrace.cli import machine
from headrace.cli.bandwidth import SIZE, measure_bandwidth
from headrace.cli.engine_check import engine_of, explained, torch_fit
from headrace.cli.fit import Fit, measure
from headrace.cli.fleet_check import to_check
from headrace.cli.models import readable
from headrace.config import Config
from headrace.engine.kv_budget import SHARE
from headrace.errors import ConfigError, ModelError
from headrace.models.engine_choice import Machine

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Literal["ok", "warning", "failed"]
    """`failed`: serving is impossible."""
    detail: str
    advice: str = ""
    """What to do; empty where nothing has to be done."""
    facts: dict[str, object] = field(default_factory=dict)
    """For programs; sizes are bytes."""


def all_checks(config: Config) -> list[Check]:
    memory = machine.memory()
    try:
        models = to_check(config)
    except (ConfigError, ModelError) as error:
        about, to_write = [Check("Model", "failed", "the models of [models] can't be served", error.message)], 0
    else:
        bandwidth = functools.cache(measure_bandwidth)
        parts = [model_checks(each, memory, bandwidth) for _, each in models]
        about = [
            dataclasses.replace(check, name=f"{check.name} {label}".rstrip())
            for (label, _), (checks, _) in zip(models, parts, strict=True)
            for check in checks
        ]
        to_write = sum(size for _, size in parts)
    return [
        check_python(),
        check_packages(),
        check_cores(config),
        check_processor(),
        check_memory(memory),
        *about,
        check_disk(config.model.cache_dir, to_write),
        check_address(config),
        check_open_files(),
    ]


def model_checks(config: Config, memory: machine.Memory | None, bandwidth: Callable[[int], float]) -> tuple[list[Check], int]:
    """Of the configured model: whether it fits, what serves it, how fast it can be; and the bytes that its first start writes."""
    fit, trouble = None, ""
    try:
        fit = measure(config)
    except ModelError as error:
        trouble = error.message
    checks = [
        check_fit(config, fit, trouble, memory),
        *(check_engine(config) if fit else ()),
        *check_speed(config, fit, memory, bandwidth),
    ]
    return checks, fit.to_write if fit else 0


def check_python() -> Check:
    version = platform.python_version()
    build = f"{platform.python_implementation()} {version} on {platform.system()} {platform.machine()}"
    return Check("Python", "ok", build, facts={"version": version})


def check_packages(version_of: Callable[[str], str] = importlib.metadata.version) -> Check:
    """Headrace's own requirements, as its metadata names them. Only the forms of bounds used there are understood: >= and <."""
    versions: dict[str, str] = {}
    wrong: list[str] = []
    for requirement in importlib.metadata.requires("headrace") or ():
        text, _, marker = requirement.partition(";")
        if "extra" in marker:
            continue
        found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(.*)", text.strip())
        if found is None:
            continue
        name, bounds = found[1], found[2]
        try:
            versions[name] = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        for comparison, bound in re.findall(r"(>=|<)\s*([0-9.]+)", bounds):
            newer = _release(versions[name]) >= _release(bound)
            if newer != (comparison == ">="):
                wrong.append(f"{name} is {versions[name]}, wanted {comparison}{bound}")
    if wrong:
        return Check("Packages", "failed", "; ".join(wrong), "Install again: pip install --upgrade headrace", {"versions": versions})
    shown = ", ".join(
        f"{name} {versions[name]}" for name in ("openvino", "tokenizers", "fastapi", "uvicorn", "pydantic") if name in versions
    )
    return Check("Packages", "ok", f"{len(versions)} present: {shown}, …", facts={"versions": versions})


def check_cores(config: Config) -> Check:
    cores = machine.cores()
    facts: dict[str, object] = {"cores": cores}
    shown = f"{cores:g} core{'s' if cores != 1 else ''}"
    threads = config.engine.threads
    if threads is not None and threads > cores:
        return Check(
            "Cores",
            "warning",
            f"{shown}, {threads} engine threads",
            "More threads than cores slow the engine down; lower --threads.",
            facts,
        )
    if cores < 2:
        return Check(
            "Cores", "warning", shown, "Engine and API share one core; give the container or machine two for steady streams.", facts
        )
    return Check("Cores", "ok", shown, facts=facts)


def check_processor(root: Path = Path("/")) -> Check:
    flags = machine.features(root)
    named = {
        "AVX2": "avx2" in flags,
        "AVX-512": "avx512f" in flags,
        "VNNI": bool(flags & {"avx512_vnni", "avx_vnni"}),
        "BF16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "AMX": "amx_tile" in flags,
    }
    facts: dict[str, object] = {**named}
    arm = bool(flags & {"asimd", "neon"})
    has = ", ".join(name for name, present in named.items() if present) or ("NEON" if arm else "no known features")
    name = machine.processor(root) or platform.processor() or platform.machine()
    detail = f"{name}: {has}"
    if not flags:
        return Check("Processor", "ok", f"{name}; its features can't be read here", facts=facts)
    if not arm and not named["AVX2"]:
        return Check(
            "Processor", "warning", detail, "Without AVX2 answers are slow. In a virtual machine, pass the host's processor through.", facts
        )
    if not arm and not named["AVX-512"]:
        return Check("Processor", "ok", f"{detail} (AVX-512 or AMX would be faster)", facts=facts)
    return Check("Processor", "ok", detail, facts=facts)


def check_memory(memory: machine.Memory | None) -> Check:
    if memory is None:
        return Check("Memory", "ok", "can't be read on this system")
    bound = f", limited to {memory.limit / GIB:.1f} GiB by its container or service" if memory.limit else ""
    detail = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB{bound}"
    facts: dict[str, object] = {"total": memory.total, "available": memory.available, "limit": memory.limit}
    if memory.available < GIB // 2:
        return Check("Memory", "failed", detail, "Even the smallest model needs 0.5 GiB; end other programs or raise the limit.", facts)
    return Check("Memory", "ok", detail, facts=facts)


def check_fit(config: Config, fit: Fit | None, trouble: str, memory: machine.Memory | None) -> Check:
    """Weights, working memory, and keys and values of one full context against free memory."""
    if fit is None:
        return Check("Model", "failed", f"{config.model.model} can't be served", trouble)
    facts: dict[str, object] = {
        "model": fit.name,
        "weights": fit.weights,
        "kv_bytes_per_token": fit.kv_per_token,
        "context": fit.context,
        "needed": fit.needed,
        "in_cache": fit.here,
    }
    if fit.needed == 0:
        return Check("Model", "ok", f"{fit.name} {fit.reason}", facts=facts)
    parts = [f"weights {readable(fit.weights)}"]
    if fit.kv_per_token and fit.context:
        parts.append(f"keys and values of {fit.context} tokens {readable(fit.kv_per_token * fit.context)}")
    where = "" if fit.here else "; it will be downloaded at the first start"
    detail = f"{fit.name} needs {readable(fit.needed)} of memory ({', '.join(parts)}){where}"
    if memory is None:
        return Check("Model", "ok", detail, facts=facts)
    if not fit.here and config.model.offline:
        return Check(
            "Model", "failed", f"{fit.name} is not in the cache, and `offline` is set", f"While online: headrace pull {fit.name}", facts
        )
    free = f"{readable(memory.available)} are free"
    if fit.least > memory.available:
        return Check("Model", "failed", f"{detail}, but {free}", "Take a smaller model (`headrace models`) or free memory.", facts)
    wanted = config.engine.kv_cache_gib
    if wanted is not None and fit.least + wanted * GIB > memory.available:
        detail = f"{detail}; with kv_cache_gib = {wanted:g} it is more, but {free}"
        return Check("Model", "failed", detail, "Lower --kv-cache-gib.", facts)
    # The engine refuses to start where one full context doesn't fit into its budget.
    budget = wanted * GIB if wanted is not None else SHARE * (memory.available - fit.least)
    if fit.kv_per_token * fit.context > budget:
        detail = f"{detail}, but keys and values may take {readable(budget)}"
        return Check("Model", "failed", detail, "Lower --context, set --kv-cache-gib, or free memory.", facts)
    return Check("Model", "ok", detail, facts=facts)


def check_speed(
    config: Config, fit: Fit | None, memory: machine.Memory | None, measured: Callable[[int], float] = measure_bandwidth
) -> list[Check]:
    """What reading the weights once for every token allows; nothing where no weights are read here."""
    threads = config.engine.threads or max(1, int(machine.cores()))
    if fit is None or not fit.weights or (memory is not None and memory.available < 2 * threads * SIZE):
        return []
    bandwidth = measured(threads)
    tokens = bandwidth / fit.weights
    facts: dict[str, object] = {"bytes_per_second": round(bandwidth), "tokens_per_second": round(tokens, 1)}
    detail = (
        f"at most {tokens:.0f} tokens/s for one conversation ({readable(fit.weights)} of weights, read at {bandwidth / 1e9:.0f} GB/s);"
        " several at once share each reading"
    )
    if tokens >= 5:
        return [Check("Speed", "ok", detail, facts=facts)]
    return [Check("Speed", "warning", detail, "People read 5 to 10 tokens/s: take a smaller model (`headrace models`).", facts)]


def check_engine(config: Config) -> list[Check]:
    """Which engine serves the model, and why; nothing where there is none to choose."""
    try:
        found = engine_of(config)
        if found is None:
            return []
        model, choice, path = found
        facts: dict[str, object] = {"engine": choice.engine, "format": model.format, "reason": choice.reason}
        if choice.engine != "transformers" or path is None:
            detail = explained(model, choice, known=path is not None)
            if choice.engine == "openvino" and model.format == "safetensors" and "convert" not in Machine.found().installed:
                advice = "Converting it, if that wasn't done before, takes the extra: pip install 'headrace[convert]'."
                return [Check("Engine", "warning", detail, advice, facts)]
            return [Check("Engine", "ok", detail, facts=facts)]
        fit, free, where = torch_fit(config, path)
    except ModelError as error:
        return [Check("Engine", "failed", "no engine can serve this model as configured", error.message)]
    facts |= {"needed": fit.needed, "weights": fit.weights, "free": free, "where": where}
    detail = f"{explained(model, choice, known=path is not None)}; it takes {fit} ({where})"
    if fit.needed > free:
        advice = "Take a smaller model, --quantize int8 or int4, or a shorter --context."
        return [Check("Engine", "failed", f"{detail}, but {readable(free)} are free", advice, facts)]
    return [Check("Engine", "ok", detail, facts=facts)]


def check_disk(folder: Path, needed: int) -> Check:
    """The cache folder, or where it would be made."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return Check("Cache", "failed", f"{folder} can't be made: {existing} is a file", "Set HEADRACE_CACHE to another folder.")
    free = shutil.disk_usage(existing).free
    facts: dict[str, object] = {"folder": str(folder), "free": free, "needed": needed}
    detail = f"{folder}, {readable(free)} free"
    if not os.access(existing, os.W_OK | os.X_OK):
        # A cache that was filled beforehand may well be read-only.
        status: Literal["failed", "warning"] = "failed" if needed else "warning"
        return Check("Cache", status, f"{detail}, not writable", "Set HEADRACE_CACHE to a folder you may write to.", facts)
    if free < needed:
        return Check(
            "Cache", "failed", f"{detail}, {readable(needed)} needed", "Free space, or set HEADRACE_CACHE to a larger disk.", facts
        )
    return Check("Cache", "ok", detail, facts=facts)


def check_address(config: Config) -> Check:
    """What the start itself does about it: who could reach the address, and whether it is free."""
    server, access = config.server, config.access
    facts: dict[str, object] = {"host": server.host, "port": server.port, "keys": len(access.api_keys)}
    try:
        with bind(server, access) as bound:
            loopback = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback
    except ConfigError as error:
        detail, _, advice = error.message.partition(". ")
        return Check("Address", "failed", detail, advice, facts)
    where = f"port {server.port} on {server.host} is free" if server.port else f"any free port on {server.host}"
    keys = len(access.api_keys)
    if keys or loopback:
        who = f"{keys} key{'s' if keys > 1 else ''}" if keys else "no keys, reachable from this machine only"
        return Check("Address", "ok", f"{where}; {who}", facts=facts)
    return Check("Address", "warning", f"{where}, and open to everybody who can reach it", "Set HEADRACE_API_KEYS.", facts)


def check_open_files() -> Check:
    """Each client's connection is an open file."""
    try:
        import resource
    except ImportError:
        return Check("Open files", "ok", "no limit is known on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 1024:
        return Check("Open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"up to {soft}", facts={"limit": soft})
    return Check(
        "Open files",
        "warning",
        f"up to {soft}",
        f"Many clients at once will be turned away; raise it: ulimit -n {min(hard, 65536)}",
        {"limit": soft},
    )


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else [0]
    return tuple(parts + [0] * (6 - len(parts)))
