"""A folder as transformers saves it: refused where it could run code, converted to OpenVINO otherwise."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Literal

import msgspec

from headrace.errors import ModelError
from headrace.models.cache import Cache
from headrace.models.card import ModelCard, publisher_card, read_object, write_card
from headrace.models.convert_environment import converting_python, run_logged
from headrace.models.openvino_folder import check, is_one
from headrace.models.progress import Progress
from headrace.models.safetensors_header import stored_tensors

Weights = Literal["auto", "int4", "int8", "full"]

_FORMATS = {"int4": "int4", "int8": "int8", "full": "fp32"}
_INT4_FROM = 10**9
"""Parameters from which `auto` takes int4: smaller models lose too much by it, larger ones are too slow without."""

_PASSED_ON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)


def is_transformers(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def check_transformers(folder: Path, *, trust_remote_code: bool) -> None:
    """Raises `ModelError` for weights in pickles and for models that bring their own code, unless the operator trusts them."""
    trust = "set HEADRACE_TRUST_REMOTE_CODE=1 if you trust its publisher"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("*.bin")):
        raise ModelError(f"{folder} has a config.json, but no weights (*.safetensors). Is the download complete?")
    if not weights and not trust_remote_code:
        raise ModelError(
            f"{folder} has its weights in pickle files, which can run any code when loaded. Take the model as *.safetensors, or {trust}."
        )
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in read_object(folder / name) and not trust_remote_code:
            raise ModelError(
                f"{folder} brings Python code of its own (auto_map in {name}), which isn't run. Take another model, or {trust}."
            )


def content_key(folder: Path, cache: Cache, weights: Weights) -> str:
    """Identifies what a conversion would make: the files' contents and the precision."""
    digest = hashlib.sha256(precision(folder, weights).encode())
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".bin", ".py", ".jinja", ".model", ".txt"):
            digest.update(f"\0{path.name}\0{cache.hash_of(path)}".encode())
    return digest.hexdigest()


def precision(folder: Path, weights: Weights) -> str:
    """What `auto` means for this model: int4 from a billion parameters on, int8 below."""
    if weights != "auto":
        return weights
    return "int4" if _parameters(folder) >= _INT4_FROM else "int8"


def convert_transformers(
    source: Path,
    folder: Path,
    card: ModelCard,
    cache: Cache,
    progress: Progress,
    *,
    weights: Weights,
    trust_remote_code: bool,
    offline: bool,
) -> None:
    """Fill the empty `folder` by optimum-intel in its own environment. Raises `ModelError`."""
    check_transformers(source, trust_remote_code=trust_remote_code)
    python = converting_python(cache, progress, offline=offline)
    chosen = precision(source, weights)
    command = [str(python.with_name("optimum-cli")), "export", "openvino", "--model", str(source), "--task", "text-generation-with-past"]
    command += ["--weight-format", _FORMATS[chosen], "--disable-convert-tokenizer"]
    if trust_remote_code:
        command.append("--trust-remote-code")
    log = cache.root / "convert" / f"{folder.name}.log"
    # What it needs is in the folder; only trusted code may fetch more.
    environment = {} if trust_remote_code and not offline else {"HF_HUB_OFFLINE": "1"}
    with progress.spinner(f"Converting {card.name} for OpenVINO as {chosen} (log: {log})"):
        run_logged([*command, str(folder)], log, f"Converting {card.name}", environment)
    for name in _PASSED_ON:
        if (source / name).is_file() and not (folder / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not is_one(folder):
        raise ModelError(f"Converting {card.name} made no OpenVINO model. The whole output is in {log}.")
    check(folder)
    facts = publisher_card(folder)
    kept = {field: getattr(card, field) for field in ("name", "source", "revision", "hashes", "fingerprint")}
    write_card(folder, msgspec.structs.replace(facts, **kept))


def _parameters(folder: Path) -> int:
    total = sum(tensor.elements for tensor in stored_tensors(folder))
    return total or sum(path.stat().st_size // 2 for path in folder.glob("*.bin"))
