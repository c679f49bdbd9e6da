"""Chooses, of all that a repository holds, the files that serving the model needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from headrace.errors import ModelError
from headrace.models.download import RemoteFile

Kind = Literal["openvino", "gguf", "transformers"]

_WORDS = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
    }
)
_SLOW_WORDS = frozenset({"tokenizer.model", "vocab.json", "merges.txt", "model.safetensors.index.json"})
_PREFERRED = ("Q4_K_M", "Q4_0", "Q4_1", "Q8_0", "Q6_K", "F16", "BF16")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choice:
    kind: Kind
    files: tuple[RemoteFile, ...]


def choose(
    files: Sequence[RemoteFile], select: str | None, *, trust_remote_code: bool, where: str, prefer_safetensors: bool = False
) -> Choice:
    """`select` is a GGUF file's name or quantization; `prefer_safetensors` where the repository has other formats too.

    Raises `ModelError` where there is nothing that can be served.
    """
    names = {file.path: file for file in files}
    ggufs = [file for file in files if file.path.lower().endswith(".gguf")]
    if prefer_safetensors and select is None and "config.json" in names and any(path.endswith(".safetensors") for path in names):
        return Choice("transformers", _transformers(files, trust_remote_code, where))
    if select is not None or (ggufs and "openvino_model.xml" not in names):
        return Choice("gguf", (_gguf(ggufs, select, where),))
    if "openvino_model.xml" in names and "openvino_model.bin" in names:
        if "tokenizer.json" not in names:
            raise ModelError(
                f"{where} has no tokenizer.json. Download it, and copy tokenizer.json and tokenizer_config.json from the original "
                "model's repository into the folder; then serve the folder."
            )
        wanted = _WORDS | {"openvino_model.xml", "openvino_model.bin"}
        return Choice("openvino", tuple(file for file in files if file.path in wanted))
    return Choice("transformers", _transformers(files, trust_remote_code, where))


def _gguf(ggufs: list[RemoteFile], select: str | None, where: str) -> RemoteFile:
    whole = [file for file in ggufs if not _PART.search(file.path) and "mmproj" not in file.path.lower()]
    if not whole:
        raise ModelError(f"{where} has {'only GGUF files in several parts' if ggufs else 'no GGUF file'}, which can't be served from here.")
    listed = ", ".join(PurePosixPath(file.path).name for file in whole[:20])
    if select is not None:
        exact = [file for file in whole if select in (file.path, PurePosixPath(file.path).name)]
        matching = exact or [file for file in whole if _quantization(file.path, select)]
        if len(matching) != 1:
            raise ModelError(f"{where}: {select!r} names {len(matching)} of its GGUF files; there are {listed}.")
        return matching[0]
    if len(whole) == 1:
        return whole[0]
    for quantization in _PREFERRED:
        matching = [file for file in whole if _quantization(file.path, quantization)]
        if len(matching) == 1:
            return matching[0]
    raise ModelError(f"{where} has several GGUF files: {listed}. Say which, as in {where}:Q4_K_M.")


def _quantization(path: str, wanted: str) -> bool:
    return re.search(rf"(?:^|[-._]){re.escape(wanted)}\.gguf$", PurePosixPath(path).name, re.IGNORECASE) is not None


def _transformers(files: Sequence[RemoteFile], trust_remote_code: bool, where: str) -> tuple[RemoteFile, ...]:
    top = [file for file in files if "/" not in file.path]
    if not any(file.path == "config.json" for file in top):
        raise ModelError(f"{where} holds neither an OpenVINO model, nor GGUF files, nor a Transformers model.")
    weights = [file for file in top if file.path.endswith(".safetensors")]
    if not weights:
        if not trust_remote_code:
            raise ModelError(
                f"{where} has its weights in pickle files only, which can run any code when loaded. Take a repository with "
                "*.safetensors, or set HEADRACE_TRUST_REMOTE_CODE=1 if you trust its publisher."
            )
        weights = [file for file in top if file.path.endswith((".bin", ".bin.index.json"))]
    wanted = _WORDS | _SLOW_WORDS
    code = [file for file in top if trust_remote_code and file.path.endswith(".py")]
    return (*weights, *(file for file in top if file.path in wanted), *code)
