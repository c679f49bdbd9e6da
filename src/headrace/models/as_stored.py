"""Model folders for the transformers engine: the publisher's weights as they are, beside a tokenizer and a card that we can read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from headrace.errors import ModelError
from headrace.models.cache import link_or_copy
from headrace.models.card import CARD, ModelCard, publisher_card, write_card
from headrace.models.gguf_convert import completed_card
from headrace.models.gguf_metadata import read_metadata
from headrace.models.gguf_tokenizer import check_tokenizer, tokenizer_json
from headrace.models.progress import Progress
from headrace.models.safetensors_header import stored_tensors
from headrace.types import StoredTensor

_TOKENIZER = """\
import sys
from transformers import AutoTokenizer
found = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=sys.argv[3] == "yes")
found.save_pretrained(sys.argv[2])
"""


def fill_from_folder(source: Path, folder: Path, card: ModelCard, progress: Progress, *, trust_remote_code: bool) -> None:
    """Fill the empty `folder` with the files of a Transformers folder, linked where that is possible, and a tokenizer.json if it has none.

    Raises `ModelError`.
    """
    for path in source.iterdir():
        if path.is_file() and path.name != CARD:
            link_or_copy(path, folder / path.name)
    if not (folder / "tokenizer.json").is_file():
        with progress.spinner(f"Converting the tokenizer of {card.name}"):
            _make_tokenizer(source, folder, trust_remote_code=trust_remote_code)
    facts = publisher_card(folder)
    kept = {field: getattr(card, field) for field in ("name", "source", "revision", "hashes", "fingerprint")}
    write_card(folder, msgspec.structs.replace(facts, **kept))


def fill_from_gguf(path: Path, folder: Path, card: ModelCard) -> None:
    """Fill the empty `folder` with a GGUF file and a tokenizer.json made of its metadata. Raises `ModelError`."""
    metadata = read_metadata(path)
    if int(metadata.get("split.count", 1)) > 1:
        raise ModelError(f"{path.name} is one part of several. Join them first with llama.cpp's `llama-gguf-split --merge`.")
    check_tokenizer(metadata, path.name)
    link_or_copy(path, folder / path.name)
    (folder / "tokenizer.json").write_text(tokenizer_json(metadata, path.name), encoding="utf-8")
    write_card(folder, completed_card(card, metadata))


def weights_of(folder: Path) -> list[StoredTensor]:
    """What the folder's weights are, from their headers alone; of GGUF files and pickles only the size. Raises `ModelError`."""
    others = [path for pattern in ("*.gguf", "*.bin") for path in folder.glob(pattern)]
    return stored_tensors(folder) or [StoredTensor(path.name, path.suffix[1:].upper(), (), path.stat().st_size) for path in others]


def gguf_settings(path: Path) -> dict[str, int]:
    """Of a GGUF file's metadata, what memory depends on, by config.json's words. Raises `ModelError`."""
    metadata = read_metadata(path)
    architecture = metadata.get("general.architecture", "")
    words = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
    }
    found = {ours: metadata.get(f"{architecture}.{theirs}") for ours, theirs in words.items()}
    found["vocab_size"] = len(metadata.get("tokenizer.ggml.tokens", ()))
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _make_tokenizer(source: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """Slow tokenizers (SentencePiece, vocab.json) as tokenizer.json, by transformers.

    In a process of its own: it may run a model's code.
    """
    made = folder / "made-tokenizer"
    arguments = [str(source), str(made), "yes" if trust_remote_code else "no"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", _TOKENIZER, *arguments], capture_output=True, text=True, errors="replace", check=False, env=environment
    )
    if not (made / "tokenizer.json").is_file():
        said = " ".join(ran.stderr.strip().splitlines()[-1:])[:400] or "it is of a kind of its own"
        raise ModelError(f"{source.name} has no tokenizer.json, and transformers could make none of its tokenizer: {said}.")
    for path in made.iterdir():
        if not (folder / path.name).exists():
            path.rename(folder / path.name)
        else:
            path.unlink()
    made.rmdir()
