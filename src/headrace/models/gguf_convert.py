"""Turns a GGUF file into a model folder: the OpenVINO model, `tokenizer.json`, the chat template, `headrace.json`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from headrace.errors import ModelError
from headrace.models.card import ModelCard, write_card
from headrace.models.engine_choice import GGUF_ARCHITECTURES
from headrace.models.gguf_metadata import check_whole, read_metadata
from headrace.models.gguf_tokenizer import check_tokenizer, tokenizer_json
from headrace.models.progress import Progress, log

_CHILD = """\
import sys
import openvino_genai
openvino_genai.LLMPipeline(sys.argv[1], "CPU", enable_save_ov_model=True)
"""


def check_gguf(path: Path) -> dict[str, Any]:
    """The file's metadata. Raises `ModelError`, in milliseconds, for one that could not be converted."""
    metadata = read_metadata(path)
    architecture = str(metadata.get("general.architecture", ""))
    if architecture not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"{path.name}: GGUF files of the architecture {architecture!r} can't be served, only {', '.join(sorted(GGUF_ARCHITECTURES))}. "
            "Serve the same model as an OpenVINO folder (such as hf:OpenVINO/…) or as a Transformers folder instead."
        )
    if int(metadata.get("split.count", 1)) > 1:
        raise ModelError(f"{path.name} is one part of several. Join them first with llama.cpp's `llama-gguf-split --merge`.")
    check_tokenizer(metadata, path.name)
    return metadata


def convert_gguf(path: Path, folder: Path, card: ModelCard, progress: Progress) -> None:
    """Fill the empty `folder`. `card` says where the file is from. Raises `ModelError`."""
    metadata = check_gguf(path)
    check_whole(path)
    with progress.spinner(f"Converting {path.name} for OpenVINO"):
        _convert(path, folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(metadata, path.name), encoding="utf-8")
    write_card(folder, completed_card(card, metadata))


def _convert(path: Path, folder: Path) -> None:
    """The pipeline writes beside the file that it reads, so it reads a link. In a process of its own: it may crash,
    and what it allocates is given back."""
    link = folder / "model.gguf"
    try:
        os.link(path, link)
    except OSError:
        link.symlink_to(path.resolve())
    try:
        ran = _run("-c", _CHILD, str(link))
        exact = _run("-P", "-m", "headrace.models.gguf_weights", str(link), str(folder)) if ran.returncode == 0 else ran
    finally:
        link.unlink()
    if ran.returncode == 0 and exact.returncode != 0:
        raise ModelError(f"The weights of {path.name} could not be carried over: {exact.stderr.strip()[-600:]}")
    if ran.returncode == 0 and (missed := exact.stdout.split()):
        log.warning("%s: %d matrices keep the converter's rounded offsets, %s the first", path.name, len(missed), missed[0])
    if ran.returncode != 0 or not (folder / "openvino_model.xml").is_file() or not (folder / "openvino_model.bin").is_file():
        said = (ran.stderr or ran.stdout).strip().splitlines()[-3:]
        raise ModelError(
            f"OpenVINO couldn't convert {path.name} (exit status {ran.returncode}): {' '.join(said)[:600] or 'it said nothing'}. "
            "Try another quantization of the model (Q4_0, Q4_1, Q4_K_M, Q8_0 or F16), or an OpenVINO folder of it."
        )


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, errors="replace", check=False)


def completed_card(card: ModelCard, metadata: dict[str, Any]) -> ModelCard:
    """The card with what the metadata says of the tokens and the context."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]

    def token(key: str) -> int | None:
        found = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return int(found) if found is not None and 0 <= int(found) < len(tokens) else None

    architecture = str(metadata["general.architecture"])
    bos, eos = token("bos"), token("eos")
    # `eot` and `eom` end a turn where `eos` ends a document.
    ends = tuple(dict.fromkeys(end for end in (eos, token("eot"), token("eom")) if end is not None))
    # llama.cpp adds BOS by default for SentencePiece vocabularies only.
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    return msgspec.structs.replace(
        card,
        architecture=architecture,
        context_length=int(metadata.get(f"{architecture}.context_length", 0)),
        bos_token=tokens[bos] if bos is not None else "",
        eos_token=tokens[eos] if eos is not None else "",
        bos_ids=(bos,) if adds_bos and bos is not None else (),
        eos_ids=ends,
        chat_template=str(metadata.get("tokenizer.chat_template", "")),
    )
