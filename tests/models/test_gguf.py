from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from headrace.config import ModelSection
from headrace.errors import ModelError
from headrace.models.card import ModelCard
from headrace.models.gguf_convert import check_gguf
from headrace.models.gguf_metadata import check_whole, read_metadata
from headrace.models.gguf_tokenizer import tokenizer_json
from headrace.models.resolve import resolve
from headrace.models.tokenizer import TextTokenizer
from headrace.types import ModelFiles
from models.words import described


def write_gguf(path: Path, metadata: dict[str, Any], *, count: int | None = None) -> Path:
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, len(metadata) if count is None else count)
    for key, value in metadata.items():
        data += _string(key) + _value(value)
    path.write_bytes(data)
    return path


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    kind = {int: 5, float: 6, str: 8}[type(value[0])]
    parts = [_string(item) if kind == 8 else struct.pack("<i" if kind == 5 else "<f", item) for item in value]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(parts)


def byte_level_metadata(pre: str = "smollm") -> dict[str, Any]:
    words = described()
    added = words["added_tokens"]
    vocabulary = sorted(words["model"]["vocab"], key=words["model"]["vocab"].get)
    tokens = vocabulary + [item["content"] for item in added if item["content"] not in words["model"]["vocab"]]
    special = {item["content"]: 3 if item["special"] else 4 for item in added}
    return {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [special.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in words["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


def build(metadata: dict[str, Any]) -> TextTokenizer:
    import json

    return TextTokenizer(json.loads(tokenizer_json(metadata, "m.gguf")), ModelCard())


def test_metadata_comes_back_as_it_was_written(tmp_path: Path) -> None:
    metadata = {**byte_level_metadata(), "a.bool": True, "a.float": 0.5, "a.floats": [1.0, 2.0], "中文": "值"}
    assert read_metadata(write_gguf(tmp_path / "m.gguf", metadata)) == metadata


@pytest.mark.parametrize("cut", [0, 3, 10, 24, 30, 200, 2000])
def test_files_cut_short_are_refused(tmp_path: Path, cut: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_metadata())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError):
        read_metadata(path)


def test_claims_of_endless_contents_are_refused_at_once(tmp_path: Path) -> None:
    endless = [
        struct.pack("<IQQ", 3, 0, 2**62),
        struct.pack("<IQQQ", 3, 0, 1, 2**62),
        struct.pack("<IQQ", 3, 0, 1) + _string("k") + struct.pack("<IIQ", 9, 4, 2**61),
        struct.pack("<IQQ", 3, 0, 1) + _string("k") + struct.pack("<IIQ", 9, 8, 2**61),
        struct.pack("<IQQ", 3, 0, 1) + _string("k") + struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<IQQ", 99, 0, 1),
    ]
    for body in endless:
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + body)
        with pytest.raises(ModelError):
            read_metadata(tmp_path / "m.gguf")


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-2", "tekken", "gpt-4o"])
def test_byte_level_tokenizers_keep_every_text(pre: str) -> None:
    tokenizer = build(byte_level_metadata(pre))
    for text in ("Hello, world! I'll don't 12345", "你好，世界。 🎉", "  a\n\n\tb  ", "<|im_end|><think>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [tokenizer.token_bytes(token) for token in tokenizer.encode("123")]
    assert digits == [b"1", b"2", b"3"] or pre not in ("smollm", "qwen2", "tekken")


def test_sentencepiece_merges_by_score() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc", "abc", "▁abc"]
    scores = [0.0] * (3 + 256) + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 8],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = build(metadata)
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("abc bc é")] == [b" abc", b" ", b"bc", b" ", b"\xc3", b"\xa9"]
    assert tokenizer.decode(tokenizer.encode("abc bc é</s>")) == "abc bc é</s>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"tokenizer.ggml.pre": "never-heard-of"}, "never-heard-of"),
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"split.count": 3}, "llama-gguf-split"),
    ],
)
def test_what_cant_be_converted_is_refused_with_what_to_do(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**byte_level_metadata(), **change})
    with pytest.raises(ModelError, match=words):
        check_gguf(path)
    with pytest.raises(ModelError, match=words):
        resolve(ModelSection(model=str(path), cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache" / "models").exists()


def test_a_file_whose_tensors_are_cut_short_never_reaches_openvino(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", byte_level_metadata()).read_bytes()
    tensors = [_string("a") + struct.pack("<IQIQ", 1, 64, 0, 0), _string("b") + struct.pack("<IQQIQ", 2, 32, 2, 3, 256)]  # F32, Q4_1
    head = whole[:8] + struct.pack("<Q", len(tensors)) + whole[16:] + b"".join(tensors)
    data = bytes(-len(head) % 32 + 256 + 2 * 20)
    path = tmp_path / "m.gguf"
    path.write_bytes(head + data)
    check_whole(path)
    path.write_bytes(head + data[:-1])
    with pytest.raises(ModelError, match=r"cut short: it has .* Fetch it again"):
        resolve(ModelSection(model=str(path), cache_dir=tmp_path / "cache"))
    assert list((tmp_path / "cache" / "work").iterdir()) == []


@pytest.mark.slow
def test_a_file_that_openvino_cant_read_leaves_nothing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", byte_level_metadata())
    with pytest.raises(ModelError, match="OpenVINO"):
        resolve(ModelSection(model=str(path), cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache" / "models").exists()
    assert list((tmp_path / "cache" / "work").iterdir()) == []


@pytest.mark.slow
def test_a_local_file_is_converted_once(tmp_path: Path, default_model: ModelFiles) -> None:
    source = next((Path(default_model.folder).parents[1] / "files").glob("smollm2-135m-instruct-*/*.gguf"))
    section = ModelSection(model=str(source), cache_dir=tmp_path, offline=True)
    files = resolve(section)
    assert files.name == "SmolLM2-135M-Instruct.Q4_1"
    assert files.context_length == 8192
    converted = (Path(files.folder) / "openvino_model.bin").stat().st_mtime_ns
    assert resolve(section) == files
    assert (Path(files.folder) / "openvino_model.bin").stat().st_mtime_ns == converted
