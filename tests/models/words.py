"""A tokenizer of the usual kind, small enough to be trained here."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from headrace.models.card import ModelCard
from headrace.models.tokenizer import TextTokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. It wasn't there, they'll say; 1234567890 times! "
    "你好，世界。今天天气怎么样？我们去公园散步吧。\n\tdef main(argument):\n        return argument ** 2\n"
)

ADDED = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<think>", False),
    ("</think>", False),
    ("<tool_call>", False),
)


@cache
def _trained() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name, special in ADDED if special])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name, special in ADDED if not special])
    return str(tokenizer.to_str())


def described() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_trained())
    return found


@cache
def small_tokenizer() -> TextTokenizer:
    return TextTokenizer(described(), ModelCard(eos_ids=(1,)))


def sentencepiece_described(scheme: str | None) -> dict[str, Any]:
    """BPE with byte fallback over ▁, the space put before a text by Metaspace's scheme, or by the normalizer (None)."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"helowrd<>s/",
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
    ]
    pieces += ["wo", "wor", "worl", "world", "▁world"]
    merges = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["▁", "hello"], ["w", "o"], ["wo", "r"], ["wor", "l"], ["worl", "d"]]
    merges.append(["▁", "world"])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for index, name in enumerate(pieces[:3])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if scheme is None else None,
        "pre_tokenizer": None if scheme is None else metaspace,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
