"""Builds `tokenizer.json` from a GGUF file's metadata.

Pre-tokenizers are named by `tokenizer.ggml.pre`; their regular expressions are the ones of the models' own
tokenizer.json files, which llama.cpp keeps in `src/llama-vocab.cpp` beside its rewritten ones.
"""

from __future__ import annotations

import json
from typing import Any

from headrace.errors import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLIT_BY: dict[str, str] = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "hunyuan": _QWEN2,
    "megrez": _QWEN2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "glm4": _LLAMA3,
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
    "tekken": _TEKKEN,
}
_DIGITS_THEN_GPT2 = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_GPT2 = frozenset({"gpt-2", "gpt2", "default", "phi-2", "olmo", "mpt", "jina-es", "jina-de", "roberta-bpe"})
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "glm4", "chatglm-bpe", "gpt-4o", "llama4", "tekken"})
"""Their tokenizers take a word that is in the vocabulary whole, without merging up to it (`ignore_merges`)."""
_NFC = frozenset({"qwen2", "deepseek-r1-qwen", "hunyuan"})


def check_tokenizer(metadata: dict[str, Any], file: str) -> None:
    """Refuse, before anything long is done, a tokenizer that `tokenizer_json` could not build exactly. Raises `ModelError`."""
    kind, pre = _kind(metadata)
    if kind == "gpt2":
        if pre in _SPLIT_BY or pre in _DIGITS_THEN_GPT2 or pre in _GPT2:
            return
        what = f"splits words as {pre!r} does"
    elif kind == "llama":
        return
    else:
        what = f"is of the kind {kind!r}"
    raise ModelError(
        f"{file}: its tokenizer {what}, which can't be rebuilt exactly from a GGUF file. Serve the same model as an "
        "OpenVINO folder (such as hf:OpenVINO/…) or as a Transformers folder (`pip install headrace[convert]`) instead."
    )


def tokenizer_json(metadata: dict[str, Any], file: str) -> str:
    """The text of tokenizer.json. Raises `ModelError` where the metadata is incomplete or of an unknown kind."""
    check_tokenizer(metadata, file)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{file}: its vocabulary names a token twice; fetch another conversion of the model.")
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"{file} is damaged: {len(tokens)} tokens, but {len(types)} token types.")
    kind, pre = _kind(metadata)
    described = _byte_level(metadata, pre) if kind == "gpt2" else _sentencepiece(metadata)
    described["added_tokens"] = [
        {
            "id": token,
            "content": tokens[token],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind_of_token != _USER_DEFINED,
        }
        for token, kind_of_token in enumerate(types)
        if tokens[token] and kind_of_token in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "post_processor": None, **described}, ensure_ascii=False)


def _kind(metadata: dict[str, Any]) -> tuple[str, str]:
    if not metadata.get("tokenizer.ggml.tokens"):
        raise ModelError("The GGUF file has no vocabulary in it. Fetch another conversion of the model.")
    return str(metadata.get("tokenizer.ggml.model", "")), str(metadata.get("tokenizer.ggml.pre", "default"))


def _vocabulary(metadata: dict[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def _byte_level(metadata: dict[str, Any], pre: str) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pre in _SPLIT_BY:
        split = {"type": "Split", "pattern": {"Regex": _SPLIT_BY[pre]}, "behavior": "Isolated", "invert": False}
        steps: list[dict[str, Any]] = [split, byte_level]
    else:
        steps = [{**byte_level, "use_regex": True}]
        if pre in _DIGITS_THEN_GPT2:
            steps.insert(0, {"type": "Digits", "individual_digits": True})
    merges = [merge.split(" ") for merge in metadata.get("tokenizer.ggml.merges", ())]
    if any(len(merge) != 2 for merge in merges):
        raise ModelError("The GGUF file's merges are damaged. Fetch another conversion of the model.")
    return {
        "normalizer": {"type": "NFC"} if pre in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": _vocabulary(metadata),
            "merges": merges,
        },
    }


def _sentencepiece(metadata: dict[str, Any]) -> dict[str, Any]:
    """SentencePiece's BPE with byte fallback, as transformers converts it (`LlamaConverter` in convert_slow_tokenizer.py)."""
    vocabulary = _vocabulary(metadata)
    scores: list[float] = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(vocabulary):
        raise ModelError("The GGUF file's vocabulary has no scores. Fetch another conversion of the model.")
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    strip: list[dict[str, Any]] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    unknown = metadata["tokenizer.ggml.tokens"][int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(vocabulary, scores),
        },
    }


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Every way to cut a piece into two others is a merge; the likelier the piece, the earlier its merges."""
    found: list[tuple[float, int, int, list[str]]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[index], vocabulary[left], vocabulary[right], [left, right]))
    found.sort(key=lambda merge: merge[:3])
    return [merge[3] for merge in found]
