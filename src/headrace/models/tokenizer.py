"""A model's tokenizer, from its tokenizer.json: exact, safe for text from outside, and quick to refuse what is too long."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from headrace.errors import InvalidParameter, ModelError, TooManyTokens
from headrace.models.byte_tokenizer import ByteTokenizer
from headrace.models.card import ModelCard, read_card, read_object
from headrace.models.control_tokens import ControlSearch, ControlToken
from headrace.models.token_bounds import TokenBounds
from headrace.models.token_bytes import byte_table, is_byte_level
from headrace.models.token_stream import TokenBytes
from headrace.ports import Tokenizer, TokenStream
from headrace.types import ModelFiles

_SHORT = 1 << 13
"""Characters encoded in one go."""
_PIECE = 1 << 15
_WINDOW = 1 << 14
_UNCUT = 1 << 18
"""Characters without a place to cut that are taken as one piece: 0.1 s and 75 MiB. Eight million were 5 s and 700 MiB."""

_CUTS = (
    # Between the two no tokenizer's pre-tokenizer depends on what is on the other side (their regular expressions
    # match from left to right and look ahead only after white space); the vocabulary is asked before each is used.
    (r"\S(?= \S)", re.compile(r"[^\s\0] ")),
    (r"[A-Za-z0-9\u4e00-\u9fff](?=\n)", re.compile(r"[A-Za-z0-9\u4e00-\u9fff]\n")),
    (r"[\u4e00-\u9fff](?=[，。！？；：、])", re.compile(r"[\u4e00-\u9fff][，。！？；：、]")),
)


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Raises `ModelError` for a folder whose tokenizer can't be served, `ValueError` for a remote model, which has its own."""
    return load_text_tokenizer(files)


def load_text_tokenizer(files: ModelFiles) -> TextTokenizer | ByteTokenizer:
    if files.kind == "echo":
        return ByteTokenizer()
    if files.kind == "remote":
        raise ValueError("a remote engine tokenizes by itself")
    path = Path(files.folder) / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{files.folder} has no tokenizer.json. Copy it, with tokenizer_config.json, from the model's original repository."
        )
    return _from_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _from_file(path: Path, changed: int) -> TextTokenizer:
    """The template and its caller share one: it takes a quarter of a second to build, and it is never changed."""
    return TextTokenizer(read_object(path), read_card(path.parent))


class TextTokenizer:
    """`tokenizers` over a copy of tokenizer.json in which every added token is special, so that none is found in plain text.

    Added tokens of white space alone are left as they are: they are text, and the model saw them as such.
    """

    def __init__(self, described: dict[str, Any], card: ModelCard) -> None:
        self._bos_ids = card.bos_ids
        self._eos_ids = frozenset(card.eos_ids)
        silent: set[int] = set()
        controls: dict[str, ControlToken] = {}
        added: dict[int, str] = {}
        for token in described.get("added_tokens") or []:
            added[token["id"]] = token["content"]
            if not token["special"] and not token["content"].strip(" \t\r\n▁"):
                continue
            if token["special"]:
                silent.add(token["id"])
            token["special"] = True
            controls[token["content"]] = ControlToken(token["id"], bool(token.get("lstrip")), bool(token.get("rstrip")))
        for length in ("truncation", "padding"):
            described[length] = None
        self.controls: Mapping[str, ControlToken] = controls
        self._control_ids = frozenset(token.id for token in controls.values())
        self._search = ControlSearch(controls)
        self._plain = _build(described)
        continuing = _without_prefix_space(described)
        self._continuing = self._plain if continuing == described else _build(continuing)
        # Of transformers' ways, only Metaspace's `first` tells a text's beginning from text after a control token.
        self._after_control = self._continuing if _prefixes_first_only(described) else self._plain
        self._prefix_space = continuing != described
        table = byte_table(described, self._plain.get_vocab(with_added_tokens=True), added)
        self._tokens = TokenBytes(table, frozenset(silent))
        text_bytes = [raw for token, raw in enumerate(table) if raw and token not in self._control_ids]
        self._bounds = TokenBounds(text_bytes, _shrink(described))
        self._cut = _safe_cuts(text_bytes, byte_level=is_byte_level(described))

    @property
    def vocab_size(self) -> int:
        return len(self._tokens.table)

    @property
    def bos_ids(self) -> tuple[int, ...]:
        return self._bos_ids

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    def at_least(self, text: str) -> int:
        """A sure lower bound on the text's tokens, by a histogram of its bytes."""
        return self._bounds.at_least(text)

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        return self._encode(self._plain, text, limit)

    def encode_after_control(self, text: str, *, limit: int | None = None) -> list[int]:
        """As `encode`, for text that follows a control token: what is put before it there differs between tokenizers."""
        return self._encode(self._after_control, text, limit)

    def _encode(self, tokenizer: Any, text: str, limit: int | None) -> list[int]:
        try:
            if len(text) <= _SHORT:
                tokens: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
            else:
                tokens = self._encode_long(tokenizer, text, limit)
        except (UnicodeEncodeError, TypeError):  # the library's own complaint is a TypeError
            raise InvalidParameter("The text holds half of a surrogate pair, which is no character.") from None
        if limit is not None and len(tokens) > limit:
            raise TooManyTokens(len(tokens))
        if not self._control_ids.isdisjoint(tokens):
            tokens = self._encode_broken(tokenizer, text)
        return tokens

    def _encode_long(self, tokenizer: Any, text: str, limit: int | None) -> list[int]:
        if limit is not None:
            at_least = self._bounds.exceeds(text, limit)
            if at_least:
                raise TooManyTokens(at_least)
        tokens: list[int] = []
        start = 0
        for end in self._cuts(text):
            piece = tokenizer.encode_batch_fast([text[start:end]], add_special_tokens=False)[0]
            count = len(tokens) + len(piece)
            if limit is not None and count > limit:
                raise TooManyTokens(count + self._bounds.at_least(text, end))
            tokens += piece.ids  # after counting: the GIL is held while they become Python's, 150 ms for four million
            start, tokenizer = end, self._continuing
        return tokens

    def _cuts(self, text: str) -> Iterator[int]:
        """Ends of the pieces that can be encoded one by one, to the same tokens as the whole.

        Raises `InvalidParameter` where a piece would be far too long. A vocabulary that allows no cuts at all takes any text whole.
        """
        start = 0
        while self._cut is not None and len(text) - start > 2 * _PIECE:
            longest = start + _PIECE + _UNCUT
            for at in range(start + _PIECE, min(len(text) - 1, longest), _WINDOW):
                found = self._cut.search(text, at, min(len(text), at + _WINDOW + 2))
                if found is not None:
                    start = found.end()
                    yield start
                    break
            else:
                if len(text) > longest:
                    raise InvalidParameter(
                        f"The text has {_UNCUT} characters on end in which it can't be cut for tokenizing: no word ends there before a "
                        "space or a line's end. Break it up."
                    )
                break
        yield len(text)

    def _encode_broken(self, tokenizer: Any, text: str) -> list[int]:
        """A Unigram model finds whatever piece is in its vocabulary, control tokens too. Cut inside their names it can't."""
        tokens: list[int] = []
        start = 0
        for begin, _, _ in self._search.matches(text):
            tokens += tokenizer.encode_batch_fast([text[start : begin + 1]], add_special_tokens=False)[0].ids
            start, tokenizer = begin + 1, self._continuing
        tokens += tokenizer.encode_batch_fast([text[start:]], add_special_tokens=False)[0].ids
        if not self._control_ids.isdisjoint(tokens):
            raise InvalidParameter("The text can't be kept apart from the model's control tokens.")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text = b"".join([self.token_bytes(token) for token in tokens]).decode("utf-8", "replace")
        return text[1:] if self._prefix_space and text[:1] == " " else text

    def token_bytes(self, token: int) -> bytes:
        table = self._tokens.table
        raw = table[token] if 0 <= token < len(table) else None
        if raw is None:
            raise InvalidParameter(f"{token} is not a token id; the vocabulary has {len(table)}.", param="tokens")
        return raw

    def stream(self) -> TokenStream:
        return self._tokens.stream()


def _build(described: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer as FromJson

    try:
        tokenizer = FromJson.from_str(json.dumps(described, ensure_ascii=False))
    except Exception as error:  # noqa: BLE001 (the library raises bare Exceptions)
        raise ModelError(f"The model's tokenizer.json can't be read ({error}). Fetch the model again.") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def _steps(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[inside] for inner in _steps(part, inside)]
    return [step]


def _shrink(described: dict[str, Any]) -> int:
    shrink = 3 if any(step["type"] == "NFC" for step in _steps(described.get("normalizer"), "normalizers")) else 1
    for step in _steps(described.get("normalizer"), "normalizers"):
        if step["type"] not in ("NFC", "Prepend") and not _only_spaces(step):
            return 0
    model = described["model"]
    # Unknown characters may fuse into one token of any length.
    fuses = model["type"] != "BPE" or (model.get("unk_token") is not None and not model.get("byte_fallback"))
    return 0 if fuses and not is_byte_level(described) else shrink


def _only_spaces(step: dict[str, Any]) -> bool:
    return bool(step["type"] == "Replace") and step["pattern"] == {"String": " "} and step["content"] == "▁"


def _prefixes_first_only(described: dict[str, Any]) -> bool:
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps)


def _without_prefix_space(described: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer for text in the middle of text."""
    normalizers = _steps(described.get("normalizer"), "normalizers")
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    changed = dict(described)
    if len(kept) != len(normalizers):
        changed["normalizer"] = {"type": "Sequence", "normalizers": kept}
    steps = _steps(described.get("pre_tokenizer"), "pretokenizers")
    without = [_unprefixed(step) for step in steps]
    if without != steps:
        changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": without}
    return changed


def _unprefixed(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
        return {**step, "add_prefix_space": False}
    if step["type"] == "Metaspace" and (step.get("prepend_scheme", "always") != "never" or step.get("add_prefix_space")):
        return {key: value for key, value in step.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    return step


def _safe_cuts(tokens: list[bytes], *, byte_level: bool) -> re.Pattern[str] | None:
    """Where a text may be cut: places that no token of the vocabulary reaches across. None: nowhere."""
    words = "\0".join(raw.decode("utf-8", "replace") for raw in tokens)
    usable = [cut for cut, crossing in (_CUTS if byte_level else _CUTS[:1]) if not crossing.search(words)]
    return re.compile("|".join(usable)) if usable else None
