"""The models of [models.NAME] in the configuration: versions of families, their names, and the memory that each will need.

`NAME@VERSION` is what a version is called everywhere inside, and what it is billed under. [models.NAME] is a version itself, if it says
which model it is, and what its further versions, [models."NAME@VERSION"], leave unsaid.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from headrace.config import Config, ModelEntry, ModelSection
from headrace.engine.kv_budget import free_memory
from headrace.engine.processor import features, kv_element_bytes, multiplies_bf16
from headrace.engine.torch_device import BYTES
from headrace.engine.torch_fit import kv_per_token
from headrace.errors import ConfigError, ModelError
from headrace.models.address import Echo, Local, Remote, Repository, parse
from headrace.models.as_stored import gguf_settings
from headrace.models.card import read_object
from headrace.models.catalog import CatalogEntry
from headrace.models.openvino_folder import is_one, kv_elements
from headrace.models.resolve import resolve
from headrace.types import ModelFiles

WORKING = 340 * 2**20
"""Bytes of a worker beside weights, keys and values: the interpreter, the engine's library, its compiled graph."""
WORKING_TORCH = 500 * 2**20
"""The same with torch and transformers: 430 to 460 MiB."""
WORKING_ECHO = 64 * 2**20
KV_SHARE = 0.4
"""Of the budget, what all models' keys and values take together where nothing is set."""
QUANTIZED = {"int8": 0.53, "int4": 0.3, "nf4": 0.3}
"""What quantizing leaves of 16-bit weights, scales included."""
_BLOCK = 32
"""Tokens by which keys and values are allocated, or more than that."""
LEAST_KV, MOST_KV = 2**28, 2**31
FREE_SHARE = 0.9
"""Of the memory that is free at the start, what models may take where nothing is set."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,126}")
_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A model to be served, with the part of the configuration that its worker may see."""

    files: ModelFiles
    section: ModelSection
    entry: ModelEntry | None = None
    """Its section in the configuration, where it is one of [models]."""
    family: str = ""
    """The name that it shares with its other versions."""
    version: str = ""


def current_versions(members: Iterable[Member]) -> dict[str, str]:
    """By family, the version that its name stands for at first: [models.NAME] itself, or else the first."""
    current: dict[str, str] = {}
    for member in members:
        if member.family and (member.family not in current or member.family in member.files.aliases):
            current[member.family] = member.files.name
    return current


def fleet(config: Config) -> list[Member]:
    """The members as far as they are known without a download. Raises `ConfigError` and `ModelError` for what can't be meant."""
    entries = config.fleet.models
    members: list[Member] = []
    for name, entry in entries.items():
        family, at, version = name.partition("@")
        if not _NAME.fullmatch(family) or (at and not _VERSION.fullmatch(version)):
            raise ConfigError(f"models: {name!r} is no name for a model; it is NAME or NAME@VERSION, of letters, digits and . _ : / -")
        base = entries.get(family) if at else None
        whole = _inherited(entry, base)
        if whole.model is None:
            if at:
                raise ConfigError(f"models.{name} doesn't say which `model` it is, and there is no [models.{family}] that does.")
            if not any(other.startswith(f"{family}@") for other in entries):
                raise ConfigError(f"models.{name} doesn't say which `model` it is.")
            continue
        version = version or entry.version
        id_ = f"{family}@{version}"
        if any(member.files.name == id_ for member in members):
            raise ConfigError(
                f"models: {id_} is there twice; [models.{family}] itself is version {entry.version!r}, unless `version` says."
            )
        section = _section(config.model, whole, id_)
        aliases = () if at else (family, *entry.aliases)
        files = _files(section, id_, aliases if not at else tuple(entry.aliases), look=True)
        members.append(Member(files, section, whole, family, version))
    families = Counter(member.family for member in members)
    members = [
        dataclasses.replace(member, files=msgspec.structs.replace(member.files, versioned=families[member.family] > 1))
        for member in members
    ]
    _check_names(config, members, {member.files.name for member in members} | {member.family for member in members})
    return members


def _inherited(entry: ModelEntry, base: ModelEntry | None) -> ModelEntry:
    if base is None:
        return entry
    own = {"version", "aliases", "pinned", *(["keep_alive"] if entry.pinned else [])}
    kept = {field: getattr(base, field) for field in base.model_fields_set - entry.model_fields_set - own}
    return entry.model_copy(update=kept)


def _section(base: ModelSection, entry: ModelEntry, name: str) -> ModelSection:
    """What the model's worker is told."""
    assert entry.model is not None
    address = parse(entry.model, base.hub)
    source = entry.model
    if entry.revision is not None:
        if not isinstance(address, Repository):
            raise ConfigError(f"models.{name}: revision is for repositories on hubs; {entry.model} is none.")
        source = str(dataclasses.replace(address, revision=entry.revision))
        parse(source, base.hub)
    # What a section doesn't say is as for the default model, but for what only models that run here have.
    runs_here = not isinstance(address, Echo | Remote)
    fields = ("engine", "dtype", "device", "quantize", "weights", "context")
    theirs = base.model_fields_set - entry.model_fields_set if runs_here else set()
    same = {field: getattr(base if field in theirs else entry, field) for field in fields}
    of_a_remote = {"remote_api_key": entry.remote_api_key, "remote_model": entry.remote_model}
    return base.model_copy(update={"model": source, "name": None, **same, **of_a_remote})


def _files(section: ModelSection, name: str, aliases: tuple[str, ...], *, look: bool) -> ModelFiles:
    address = parse(section.model, section.hub)
    if isinstance(address, Local):
        return ModelFiles(name=name, kind="openvino", aliases=aliases, pending=True)
    try:
        here = isinstance(address, Echo | Remote)
        return named(resolve(section if here else section.model_copy(update={"offline": True})), name, aliases)
    except ModelError:
        if here:
            raise
        assert isinstance(address, Repository | CatalogEntry)
        return ModelFiles(name=name, kind="openvino", aliases=aliases, pending=True)


def fetched(member: Member) -> ModelFiles:
    """The member's files, on this machine. Blocks, for minutes if it downloads. Raises `ModelError`."""
    files = named(resolve(member.section), member.files.name, member.files.aliases)
    return msgspec.structs.replace(files, versioned=member.files.versioned)


def named(files: ModelFiles, name: str, aliases: tuple[str, ...]) -> ModelFiles:
    return msgspec.structs.replace(files, name=name, aliases=aliases)


def _check_names(config: Config, members: Iterable[Member], known: set[str]) -> None:
    taken = dict.fromkeys(known, "a model")
    for member in members:
        for alias in member.files.aliases:
            if alias != member.family:
                if alias in taken:
                    raise ConfigError(f"models.{member.family}: the alias {alias!r} is {taken[alias]} already.")
                taken[alias] = f"an alias of {member.files.name}"
    for alias, entry in config.fleet.aliases.items():
        if alias in taken:
            raise ConfigError(f"aliases: {alias!r} is {taken[alias]} already.")
        for target in (*([entry.to] if entry.to else ()), *entry.split, *([entry.shadow] if entry.shadow else ())):
            if target in config.fleet.aliases or target in taken.keys() - known:
                raise ConfigError(f"aliases.{alias}: {target!r} is an alias itself; say which model: {', '.join(sorted(known))}.")
            if target not in known:
                raise ConfigError(f"aliases.{alias}: there is no model {target!r}; there is {', '.join(sorted(known))}.")


# Memory


def budgets(config: Config, gpus: Sequence[int] | None = None) -> dict[str, int]:
    """Bytes of each pool that models may take: RAM, and each GPU. `gpus`: what is free on each; None asks the driver."""
    if gpus is None:
        from headrace.engine.gpu_memory import all_gpus

        gpus = [memory.free for _, memory in all_gpus()]
    given = config.fleet.memory_budget_gib
    pools = {"ram": int(given * 2**30) if given is not None else int(FREE_SHARE * free_memory())}
    return pools | {f"gpu:{number}": int(free * config.engine.gpu_memory_utilization) for number, free in enumerate(gpus)}


def kv_bytes(config: Config, member: Member, files: ModelFiles, pools: Mapping[str, int]) -> int:
    """Memory for keys and values of one replica: as set, or its part of the pool's, but for one full context at least, and at most
    for as many as run at once."""
    for given in (member.entry.kv_cache_gib if member.entry is not None else None, config.engine.kv_cache_gib):
        if given is not None:
            return int(given * 2**30)
    pool = _pool(files, member.section, pools)
    part = min(MOST_KV, max(LEAST_KV, int(KV_SHARE * pools.get(pool, 0) / max(1, len(config.fleet.models)))))
    each = kv_bytes_per_token(files, member.section, deterministic=config.engine.deterministic, on_cpu=pool == "ram")
    # Whole blocks.
    one = each * (files.context_length + _BLOCK)
    return max(one, min(part, one * config.engine.max_sequences)) if one else part


def kv_bytes_per_token(files: ModelFiles, section: ModelSection, *, deterministic: bool, on_cpu: bool) -> int:
    """Of all layers; 0 where the model's files don't say."""
    folder = Path(files.folder)
    if files.kind == "openvino":
        return int(kv_elements(folder) * kv_element_bytes(features(), deterministic=deterministic)) if is_one(folder) else 0
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    try:
        settings = read_object(folder / "config.json") if gguf is None else gguf_settings(gguf)
    except ModelError:
        return 0  # it is refused when it is loaded
    text = settings.get("text_config")
    wide = section.dtype == "float32"
    if section.dtype == "auto" and section.quantize is None and on_cpu:
        wide = not multiplies_bf16(features())
    return kv_per_token({**settings, **text} if isinstance(text, dict) else settings, BYTES["float32" if wide else "bfloat16"])


def needs(config: Config, member: Member, files: ModelFiles, pools: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each pool that all replicas of a model will need. Raises `ModelError` for options that an echo doesn't have."""
    replicas = member.entry.replicas if member.entry is not None else 1
    given = member.entry.memory_gib if member.entry is not None else None
    pool = _pool(files, member.section, pools)
    if given is not None:
        return {pool: replicas * int(given * 2**30)}
    if files.kind == "echo":
        from headrace.engine.echo import echo_memory

        return {"ram": replicas * (WORKING_ECHO + echo_memory(files.options))}
    if files.kind == "remote":
        return {"ram": replicas * WORKING_ECHO}
    each = weight_bytes(Path(files.folder), member.section) + kv_bytes(config, member, files, pools)
    if pool == "ram":
        return {"ram": replicas * (each + (WORKING if files.kind == "openvino" else WORKING_TORCH))}
    return {"ram": replicas * 2 * WORKING, pool: replicas * each}


def arithmetic(config: Config, member: Member, files: ModelFiles, pools: Mapping[str, int]) -> str:
    """How `needs` comes about, and what makes it less, for a person; empty where there is nothing to say."""
    entry = member.entry
    if files.kind in ("echo", "remote") or (entry is not None and entry.memory_gib is not None):
        return ""
    weights, kept = weight_bytes(Path(files.folder), member.section), kv_bytes(config, member, files, pools)
    replicas = f", for each of {entry.replicas} replicas" if entry is not None and entry.replicas > 1 else ""
    return (
        f"That is {weights / 2**30:.2f} GiB of weights, {kept / 2**30:.2f} GiB for keys and values (its context is "
        f"{files.context_length:,} tokens) and the process{replicas}. "
        "Lower `context` or `kv_cache_gib`, quantize it, or raise memory_budget_gib."
    )


def weight_bytes(folder: Path, section: ModelSection) -> int:
    """What the weights take once they are loaded."""
    size = sum(path.stat().st_size for pattern in ("*.bin", "*.safetensors", "*.gguf") for path in folder.glob(pattern))
    if section.quantize is not None and any(folder.glob("*.safetensors")):
        size = int(size * QUANTIZED[section.quantize])
    return size


def _pool(files: ModelFiles, section: ModelSection, pools: Mapping[str, int]) -> str:
    if files.kind not in ("transformers", "vllm") or section.device == "cpu":
        return "ram"
    gpus = [name for name in pools if name.startswith("gpu:")]
    wanted = section.device.partition(":")[2]
    return f"gpu:{wanted}" if wanted and f"gpu:{wanted}" in gpus else gpus[0] if gpus else "ram"
