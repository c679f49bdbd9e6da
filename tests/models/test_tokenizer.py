from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidParameter, ModelError, TooManyTokens
from headrace.models.byte_tokenizer import ByteTokenizer
from headrace.models.card import ModelCard
from headrace.models.tokenizer import TextTokenizer, load_tokenizer
from headrace.types import ModelFiles
from models.words import TEXT, described, sentencepiece_described, small_tokenizer

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
MIB = 2**20


@contextmanager
def lateness() -> Iterator[list[float]]:
    """How late, in seconds, a thread that sleeps a millisecond at a time is woken, meanwhile."""
    late = [0.0]
    over = threading.Event()

    def sleep() -> None:
        while not over.is_set():
            begun = time.perf_counter()
            time.sleep(0.001)
            late.append(time.perf_counter() - begun - 0.001)

    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        yield late
    finally:
        over.set()
        thread.join()


def streamed(tokenizer: TextTokenizer | ByteTokenizer, tokens: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(token) for token in tokens]) + stream.flush()


@given(texts)
def test_decoding_gives_the_text_back_also_piece_by_piece(text: str) -> None:
    tokenizer = small_tokenizer()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert streamed(tokenizer, tokens) == text
    assert b"".join(tokenizer.token_bytes(token) for token in tokens) == text.encode()


@given(st.lists(st.integers(0, 399), max_size=60))
def test_any_tokens_stream_to_what_they_decode_to(tokens: list[int]) -> None:
    tokenizer = small_tokenizer()
    tokens = [token for token in tokens if token not in {control.id for control in tokenizer.controls.values()}]
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens)


def test_half_a_character_waits_and_becomes_a_replacement_only_at_the_end() -> None:
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    raw = "é🎉".encode()
    assert [stream.push(token) for token in raw[:5]] == ["", "é", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_control_tokens_emit_nothing_in_streams_and_their_name_in_decode() -> None:
    tokenizer = small_tokenizer()
    end, think = tokenizer.controls["<|im_end|>"].id, tokenizer.controls["<think>"].id
    hello = tokenizer.encode("hello")
    assert streamed(tokenizer, [*hello, end, think, 10**6]) == "hello<think>"
    assert tokenizer.decode([*hello, end]) == "hello<|im_end|>"
    assert tokenizer.token_bytes(end) == b"<|im_end|>"


@given(texts, st.sampled_from(["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"]), texts)
def test_typed_control_tokens_stay_text(before: str, control: str, after: str) -> None:
    tokenizer = small_tokenizer()
    text = before + control + after
    tokens = tokenizer.encode(text)
    assert {token.id for token in tokenizer.controls.values()}.isdisjoint(tokens)
    assert tokenizer.decode(tokens) == text


def test_added_white_space_is_text() -> None:
    changed = described()
    spaces = {
        **changed["added_tokens"][-1],
        "id": len(changed["model"]["vocab"]) + len(changed["added_tokens"]),
        "content": "      ",
        "special": False,
    }
    changed["added_tokens"].append(spaces)
    tokenizer = TextTokenizer(changed, ModelCard())
    assert spaces["id"] in tokenizer.encode("a      b")
    assert "      " not in tokenizer.controls


@pytest.mark.parametrize("token", [-1, 10**9])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    for tokenizer in (small_tokenizer(), ByteTokenizer()):
        with pytest.raises(InvalidParameter):
            tokenizer.decode([token])
        with pytest.raises(InvalidParameter):
            tokenizer.token_bytes(token)


@pytest.mark.parametrize("text", ["\ud800", "x" * 20_000 + "\udfff"])
def test_lone_surrogates_are_refused(text: str) -> None:
    for tokenizer in (small_tokenizer(), ByteTokenizer()):
        with pytest.raises(InvalidParameter):
            tokenizer.encode(text)


def whole(tokenizer: TextTokenizer, text: str) -> list[int]:
    """In one go, whatever the length."""
    tokens: list[int] = tokenizer._plain.encode(text, add_special_tokens=False).ids
    return tokens


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.one_of(texts, st.sampled_from([TEXT, " ", "\n", "。", "x" * 500, "你好" * 300])), min_size=1, max_size=8),
    st.integers(10, 40),
)
def test_long_texts_are_the_same_in_pieces(parts: list[str], times: int) -> None:
    tokenizer = small_tokenizer()
    text = "".join(parts) * times
    assert tokenizer.encode(text) == whole(tokenizer, text)


def test_long_texts_are_cut_at_all() -> None:
    tokenizer = small_tokenizer()
    for text in ("word " * 50_000, "line\n" * 50_000, "你好，世界。" * 20_000):
        assert len(list(tokenizer._cuts(text))) >= 3, text[:10]
        assert tokenizer.encode(text) == whole(tokenizer, text)


@pytest.mark.parametrize("unit", [" ", "\n", ".", "x", "ab1-", "你"])
def test_what_cannot_be_cut_is_taken_to_a_length_and_then_refused_unread(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small_tokenizer()
    longest = unit * (2**18 // len(unit))
    for text in (longest, f"a word {longest} a word"):
        assert tokenizer.encode(text) == whole(tokenizer, text)
    monkeypatch.setattr(tokenizer, "_plain", None)
    for limit in (None, 10**6):
        with pytest.raises(InvalidParameter, match="Break it up"):
            tokenizer.encode(2 * longest, limit=limit)


@given(texts, st.integers(0, 50))
def test_the_limit_is_exact_and_the_count_a_lower_bound(text: str, limit: int) -> None:
    tokenizer = small_tokenizer()
    count = len(whole(tokenizer, text))
    assert tokenizer.at_least(text) <= count
    if count <= limit:
        assert len(tokenizer.encode(text, limit=limit)) == count
    else:
        with pytest.raises(TooManyTokens) as refused:
            tokenizer.encode(text, limit=limit)
        assert limit < refused.value.at_least <= count


@pytest.mark.parametrize("size", [20_000, 200_000])
@pytest.mark.parametrize("unit", ["x", "🎉", "word ", "你好世界", " ", "\n", "\0"])
def test_long_refusals_report_a_true_lower_bound(unit: str, size: int) -> None:
    tokenizer = small_tokenizer()
    text = unit * (size // len(unit))
    with pytest.raises(TooManyTokens) as refused:
        tokenizer.encode(text, limit=100)
    assert 100 < refused.value.at_least <= len(whole(tokenizer, text))


@given(texts)
def test_composing_normalizers_keep_the_bound_true(text: str) -> None:
    tokenizer = TextTokenizer({**described(), "normalizer": {"type": "NFC"}}, ModelCard())
    for variant in (text, text * 20, "e\u0301" * 50, "\u1100\u1161\u11a8" * 30):
        assert tokenizer.at_least(variant) <= len(whole(tokenizer, variant))


@pytest.mark.parametrize("unit", ["x", "🎉", "word ", "你好世界", "<|im_start|>"])
@pytest.mark.alone
def test_eight_mebibytes_are_refused_at_once(unit: str) -> None:
    tokenizer = small_tokenizer()
    text = unit * (8 * MIB // len(unit.encode()))
    with lateness() as late:
        begun = time.perf_counter()
        with pytest.raises(TooManyTokens):
            tokenizer.encode(text, limit=8192)
        took = time.perf_counter() - begun
    assert took < 0.5
    assert sorted(late)[-2 if len(late) > 2 else -1] < 0.02


def test_ids_of_a_refused_text_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of them, where nothing can be cut, would hold the GIL for as many hundred milliseconds."""

    class Counted:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Counted]:
            return [self]

        def __len__(self) -> int:
            return 4_000_000

    tokenizer = small_tokenizer()
    monkeypatch.setattr(tokenizer, "_plain", Counted())
    with pytest.raises(TooManyTokens) as refused:
        tokenizer.encode("<|im_start|>" * 10_000, limit=1_000_000)
    assert refused.value.at_least == 4_000_000


@pytest.mark.parametrize("scheme", [None, "always", "first"])
def test_sentencepiece_puts_a_space_before_a_text_but_not_into_its_middle(scheme: str | None) -> None:
    tokenizer = TextTokenizer(sentencepiece_described(scheme), ModelCard())
    hello = tokenizer.encode("hello world")
    assert tokenizer.decode(hello) == "hello world"
    assert [tokenizer.token_bytes(token) for token in hello] == [b" hello", b" world"]
    after_control = [tokenizer.token_bytes(token) for token in tokenizer.encode_after_control("hello")]
    assert after_control == [b"hello"] if scheme == "first" else [b" hello"]
    long = "hello world " * 20_000 + "hello"
    assert tokenizer.encode(long) == whole(tokenizer, long)
    typed = tokenizer.encode("</s>é")
    assert not {0, 1, 2} & set(typed)
    assert streamed(tokenizer, typed) == " </s>é"


def test_a_vocabulary_that_finds_control_tokens_by_itself_is_kept_from_them() -> None:
    unigram = sentencepiece_described("always")
    pieces = [[piece, -1.0] for piece in unigram["model"]["vocab"]]
    unigram["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": True}
    tokenizer = TextTokenizer(unigram, ModelCard())
    assert not {0, 1, 2} & set(tokenizer.encode("hello</s><s>world"))


def test_other_decoders_are_refused() -> None:
    with pytest.raises(ModelError, match="WordPiece"):
        TextTokenizer({**described(), "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, ModelCard())


def test_echo_has_bytes_and_remote_has_its_own() -> None:
    tokenizer = load_tokenizer(ModelFiles(name="echo", kind="echo"))
    assert tokenizer.encode("é<|im_end|>") == list("é<|im_end|>".encode())
    assert tokenizer.vocab_size == 259
    with pytest.raises(TooManyTokens):
        tokenizer.encode("é" * 10, limit=15)
    with pytest.raises(ValueError, match="remote"):
        load_tokenizer(ModelFiles(name="r", kind="remote", url="http://localhost"))


@pytest.mark.slow
def test_the_default_models_tokenizer_equals_openvinos(default_model: ModelFiles) -> None:
    import random

    import openvino_genai

    reference = openvino_genai.Tokenizer(default_model.folder)
    tokenizer = load_tokenizer(default_model)
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_ids, tokenizer.eos_ids) == ((), frozenset({2}))
    pick = random.Random(20261121)
    ranges = [(32, 127), (32, 127), (9, 14), (0xA0, 0x2000), (0x3000, 0x3100), (0x4E00, 0x5000), (0xFF00, 0xFFEF), (0x1F300, 0x1F700)]
    mixed = [TEXT, "  two  spaces\n\n\ttabs \n x", "１２３ ٣٤ ½ 3.14", "\r\n\r\nx\x00y", "👩‍👩‍👧 e\u0301"]
    mixed += ["".join(chr(pick.randrange(*pick.choice(ranges))) for _ in range(pick.randrange(1, 60))) for _ in range(500)]
    for text in mixed:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).input_ids.data[0].tolist(), repr(text)


@pytest.mark.slow
def test_the_default_model_is_quick_to_detokenize_and_to_refuse(default_model: ModelFiles) -> None:
    tokenizer = load_tokenizer(default_model)
    tokens = tokenizer.encode(TEXT * 20)
    stream = tokenizer.stream()
    begun = time.perf_counter()
    text = "".join([stream.push(token) for token in tokens])
    each = (time.perf_counter() - begun) / len(tokens)
    assert text == TEXT * 20
    assert each < 5e-6
    for unit in ("x", "🎉"):
        with lateness() as late:
            begun = time.perf_counter()
            with pytest.raises(TooManyTokens):
                tokenizer.encode(unit * (8 * MIB // len(unit.encode())), limit=8192)
            assert time.perf_counter() - begun < 0.5
        assert sorted(late)[-2 if len(late) > 2 else -1] < 0.02
