"""What a model folder says of itself: `headrace.json` where we converted it, the publisher's files otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from headrace.errors import ModelError

FORMAT = 2
"""Raised when what a conversion writes changes; models converted under another number are converted anew."""

CARD = "headrace.json"

_LONGEST_JSON = 256 * 2**20


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a model folder, as `headrace.json` holds them."""

    format: int = FORMAT
    name: str = ""
    source: str = ""
    """Where it came from, such as `hf:OWNER/NAME` or a path."""
    revision: str = ""
    architecture: str = ""
    context_length: int = 0
    """0: the model's files don't say."""
    bos_token: str = ""
    eos_token: str = ""
    bos_ids: tuple[int, ...] = ()
    """What a plain completion's prompt begins with."""
    eos_ids: tuple[int, ...] = ()
    hashes: dict[str, str] = {}
    """SHA-256 of the files it was made from, by name."""
    fingerprint: str = ""
    chat_template: str = ""


def read_card(folder: Path) -> ModelCard:
    """The folder's facts. Raises `ModelError` where a file is damaged."""
    path = folder / CARD
    if path.is_file():
        try:
            return msgspec.json.decode(_read(path), type=ModelCard)
        except msgspec.MsgspecError as error:
            raise ModelError(f"{path} is damaged ({error}). Delete the folder and pull the model again.") from None
    return publisher_card(folder)


def write_card(folder: Path, card: ModelCard) -> None:
    (folder / CARD).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises `ModelError` where it is something else."""
    if not path.is_file():
        return {}
    try:
        found = msgspec.json.decode(_read(path))
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Fetch the model again.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} should hold a JSON object. Fetch the model again.")
    return found


def _read(path: Path) -> bytes:
    if path.stat().st_size > _LONGEST_JSON:
        raise ModelError(f"{path} is larger than {_LONGEST_JSON >> 20} MiB; that is no model's description.")
    return path.read_bytes()


def publisher_card(folder: Path) -> ModelCard:
    """The facts as Hugging Face's own files tell them. Raises `ModelError` where one is damaged."""
    config = read_object(folder / "config.json")
    generation = read_object(folder / "generation_config.json")
    words = read_object(folder / "tokenizer_config.json")
    ids = _token_ids(folder)
    text = config.get("text_config")
    nested: dict[str, Any] = text if isinstance(text, dict) else {}
    bos_token = _token_name(words.get("bos_token"))
    eos_token = _token_name(words.get("eos_token"))
    eos: list[int] = []
    for holder in (generation, config, nested):
        eos = _ids(holder.get("eos_token_id"))
        if eos:
            break
    # A chat model ends its turn with the tokenizer's eos, which config.json of its base model may not name.
    if eos_token in ids and ids[eos_token] not in eos:
        eos.append(ids[eos_token])
    bos: tuple[int, ...] = ()
    if bos_token in ids and _adds_bos(folder, words, ids[bos_token]):
        bos = (ids[bos_token],)
    architectures = config.get("architectures") or [config.get("model_type", "")]
    context = config.get("max_position_embeddings") or nested.get("max_position_embeddings") or config.get("seq_length")
    context = context or words.get("model_max_length") or 0
    return ModelCard(
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        # transformers writes 1e30 where it doesn't know a tokenizer's longest text
        context_length=int(context) if isinstance(context, (int, float)) and 0 < context < 10**9 else 0,
        bos_token=bos_token,
        eos_token=eos_token,
        bos_ids=bos,
        eos_ids=tuple(eos),
        chat_template=_chat_template(folder, words),
    )


def _ids(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


def _token_name(value: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _token_ids(folder: Path) -> dict[str, int]:
    added = read_object(folder / "tokenizer.json").get("added_tokens") or []
    return {item["content"]: item["id"] for item in added}


def _adds_bos(folder: Path, words: dict[str, Any], bos: int) -> bool:
    explicit = words.get("add_bos_token")
    if isinstance(explicit, bool):
        return explicit
    # Otherwise the post-processor decides, as `encode(text)` of transformers would.
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    return path.is_file() and Tokenizer.from_file(str(path)).encode("a").ids[:1] == [bos]


def _chat_template(folder: Path, words: dict[str, Any]) -> str:
    """Newer models keep it in a file of its own; either kind may hold several, of which `default` is meant."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for found in (read_object(folder / "chat_template.json").get("chat_template"), words.get("chat_template")):
        if isinstance(found, str):
            return found
        if isinstance(found, list):
            named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
            template = named.get("default")
            if isinstance(template, str):
                return template
    return ""
