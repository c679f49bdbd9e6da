"""Filtered in any pieces, a text is what it would be in one; nothing of a match ever leaves; and no more waits than must."""

from __future__ import annotations

import re
import time
from functools import cache
from itertools import pairwise, product
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.config import FilterSection
from headrace.errors import ConfigError
from headrace.policies.filter_input import filter_steps
from headrace.policies.filters import joint
from headrace.policies.filters.personal import PERSONAL
from headrace.policies.filters.rules import output_rules
from headrace.policies.filters.stream import Rules, Stream
from headrace.policies.filters.syntax import Parser, width

Decided = list[tuple[str, str]]


@cache
def _made(settings: str) -> Rules:
    made = output_rules(FilterSection.model_validate_json(settings))
    assert made is not None
    return made


def rules(**settings: object) -> Rules:
    section = FilterSection.model_validate(settings)
    if any("\ud800" in pattern for pattern in section.deny_output_patterns):
        made = output_rules(section)  # JSON can't say it
        assert made is not None
        return made
    return _made(section.model_dump_json())


def stepwise(rules: Rules, pieces: list[str]) -> tuple[list[str], Decided]:
    """What was sent after each piece and at the end."""
    decided: Decided = []
    stream = Stream(rules, lambda kind, action: decided.append((kind, action)))
    sent = []
    for piece in pieces:
        sent.append(stream.feed(piece))
        if stream.blocked:
            return sent, decided
    return [*sent, stream.finish()], decided


def whole(rules: Rules, text: str) -> tuple[str, Decided]:
    sent, decided = stepwise(rules, [text])
    return "".join(sent), decided


def matches(pattern: str, text: str) -> list[tuple[int, int]]:
    """Every match of a pattern, overlapping ones too, by brute force with Python's own engine."""
    found = []
    for end in range(1, len(text) + 1):
        expression = re.compile(rf"(?:{pattern})(?<=\A(?s:.{{{end}}}))", re.ASCII)
        found += [(start, end) for start in range(end) if expression.match(text, start)]
    return found


def masked(text: str, found: list[tuple[int, int]]) -> str:
    merged: list[list[int]] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    out, at = "", 0
    for start, end in merged:
        out, at = out + text[at:start] + "***", end
    return out + text[at:]


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)] or [""]


CUTS = st.lists(st.integers(0, 1000), max_size=12)

_ATOMS = ["a", "b", "1", " ", "[ab]", "[^a]", ".", r"\w", r"\d", "é"]
_PLAIN = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{1,3}", "{0,2}", "{1,2}?"])).map(lambda two: f"(?:{two[0]}){two[1]}"),
    ),
    max_leaves=6,
)
_EDGES = st.sampled_from(["", "", r"\b", r"\B", "^", "$"])
PATTERNS = st.tuples(_EDGES, _PLAIN, _EDGES, _PLAIN, _EDGES).map("".join)
TEXTS = st.text(alphabet="ab1 é-", max_size=14)


@settings(max_examples=400, deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=3), TEXTS, CUTS)
def test_any_pattern_in_any_pieces(patterns: list[str], text: str, cuts: list[int]) -> None:
    try:
        made = rules(deny_output_patterns=patterns)
    except ConfigError:
        assume(False)  # \b$ alone and the like
    expected = masked(text, [found for pattern in patterns for found in matches(pattern, text)])
    one, decided = whole(made, text)
    assert one == expected
    sent, decided_in_pieces = stepwise(made, pieces_of(text, cuts))
    assert "".join(sent) == expected
    assert decided_in_pieces == decided


@settings(max_examples=300, deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=2), st.lists(st.text("ab1", min_size=1, max_size=3), max_size=2), TEXTS, CUTS)
def test_blocking_in_any_pieces(patterns: list[str], words: list[str], text: str, cuts: list[int]) -> None:
    try:
        made = rules(deny_output_patterns=patterns, deny_output=words, deny_action="block")
    except ConfigError:
        assume(False)
    found = [found for pattern in [*patterns, *map(re.escape, words)] for found in matches(pattern, text)]
    sent, decided = stepwise(made, pieces_of(text, cuts))
    assert "".join(sent) == (text[: min(found)[0]] if found else text)
    assert decided == ([("deny", "block")] if found else [])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("abAé ", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=6), st.text("abAé ", max_size=30), CUTS)
def test_words_in_any_pieces(words: list[str], text: str, cuts: list[int]) -> None:
    made = rules(deny_output=words)
    expected = masked(text, [found for word in words for found in matches(re.escape(word.casefold()), text.casefold())])
    sent, _ = stepwise(made, pieces_of(text, cuts))
    assert "".join(sent) == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(_PLAIN, min_size=1, max_size=2), st.lists(st.text("ab", min_size=1, max_size=4), max_size=2), st.text("ab1", max_size=6))
def test_nothing_waits_that_no_match_can_reach(patterns: list[str], words: list[str], text: str) -> None:
    made = rules(deny_output_patterns=patterns, deny_output=words)
    assume(all(width(Parser(pattern).parse()) <= 5 for pattern in patterns))
    stream = Stream(made, lambda kind, action: None)
    stream.feed(text)
    held = stream.base
    if held == len(text):
        return
    every = "|".join([*patterns, *words])
    longer = ("".join(more) for length in range(1, 5) for more in product("ab1 é", repeat=length))
    assert any(re.compile(rf"(?:{every})(?<=\A(?s:.{{{len(text + more)}}}))").match(text + more, held) for more in longer)


KEY = "sk-proj-abcDEF1234567890abcd"
SAMPLES = {
    "email": ["bob.smith+x@mail.example.com", "a@b.co", "o_O@ex-ample.org"],
    "phone": ["+1 (415) 555-2671", "+442071838750", "13812345678", "138-1234-5678", "86 13912345678", "010-12345678", "(415) 555-2671"],
    "card": ["4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "378282246310005", "3782 822463 10005", "6011000990139424"],
    "cn_id": ["11010519491231002X", "11010519491231002x"],
    "secret": [
        KEY,
        "hr-0123456789abcdefABCDEF",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "xoxb-123456789012-abc",
        "AIza" + "Sy0_-" * 7,
    ],
}
NONE = {
    "email": ["bob@", "@example.com", "bob@example", "bob at example.com", "a @b.co"],
    "phone": ["1381234567", "138123456789", "23812345678", "12345", "2026-11-21", "+12345"],
    "card": ["4111111111111112", "41111111111111111111", "4111 1111 1111 1112", "4111", "1111111111111117"],
    "cn_id": ["110105194912310021", "11010519491331002X", "1101051949123100", "511010519491231002X"],
    "secret": ["sk-short1", "sk-this-is-only-a-long-name", "task-12345678901234567890", "AKIA123", "ghp_short"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in SAMPLES.items() for text in texts])
@pytest.mark.parametrize("around", ["{}", "x {} y", "(“{}”)", "是{}。", "{}\n"])
def test_personal_data_is_masked_in_all_splits(kind: str, text: str, around: str) -> None:
    made = rules(pii_output="mask", pii_kinds=[kind])
    expected = around.format("***")
    given_text = around.format(text)
    assert whole(made, given_text) == (expected, [(kind, "mask")])
    for cut in range(len(given_text) + 1):
        sent, decided = stepwise(made, [given_text[:cut], given_text[cut:]])
        assert ("".join(sent), decided) == (expected, [(kind, "mask")])
    sent, _ = stepwise(made, list(given_text))
    assert "".join(sent) == expected


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in NONE.items() for text in texts])
def test_what_only_looks_alike_stays(kind: str, text: str) -> None:
    made = rules(pii_output="mask", pii_kinds=[kind])
    for pieces in ([f"x {text} y"], list(f"x {text} y")):
        sent, decided = stepwise(made, pieces)
        assert ("".join(sent), decided) == (f"x {text} y", [])


_SNIPPETS = [text for texts in (*SAMPLES.values(), *NONE.values()) for text in texts]
_MIXED = st.lists(st.one_of(st.sampled_from(_SNIPPETS), st.sampled_from([*" ,.@+-1234567890a", "中", "@x.com", "sk-"])), max_size=8).map(
    "".join
)


@settings(max_examples=200, deadline=None)
@given(_MIXED, CUTS)
def test_personal_data_in_any_text_and_any_pieces(text: str, cuts: list[int]) -> None:
    made = rules(pii_output="mask", deny_output=["abc", "1 1"])
    expected, decided = whole(made, text)
    for pieces in (pieces_of(text, cuts), list(text)):
        sent, decided_in_pieces = stepwise(made, pieces)
        assert "".join(sent) == expected
        assert decided_in_pieces == decided


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["email", "card", "cn_id", "phone"]), _MIXED)
def test_personal_data_is_all_that_its_patterns_match(kind: str, text: str) -> None:
    text = text[:60]
    made = rules(pii_output="mask", pii_kinds=[kind])
    found = [
        (start, end)
        for personal in PERSONAL[kind]
        for pattern in personal.patterns
        for start, end in matches(pattern, text)
        if personal.check is None or personal.check(text[start:end])
    ]
    assert whole(made, text)[0] == masked(text, found)


def test_digits_that_go_on_are_no_card_wherever_they_are_cut() -> None:
    made = rules(pii_output="mask")
    card = "4111111111111111"
    sent, _ = stepwise(made, [card, "1", "1", "1", "2 ok"])
    assert "".join(sent) == card + "1112 ok"
    assert sent[0] == ""
    sent, _ = stepwise(made, [card, " ok"])
    assert "".join(sent) == "*** ok"


def test_a_private_key_and_what_comes_before_its_end() -> None:
    made = rules(pii_output="mask")
    lines = "\n".join(["A" * 64] * 5 + ["bcd="])
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{lines}\n-----END RSA PRIVATE KEY-----"
    assert whole(made, f"Here:\n{key}\nBye")[0] == "Here:\n***\nBye"
    cut_off = whole(made, "-----BEGIN PRIVATE KEY-----\n" + "A" * 64 + "\n" + "B" * 64)[0]
    assert cut_off == "***"


def test_overlapping_words_are_masked_as_one_and_touching_ones_apart() -> None:
    assert whole(rules(deny_output=["abc", "bcde"]), "xabcdex") == ("x***x", [("deny", "mask")])
    assert whole(rules(deny_output=["ab"]), "xababx")[0] == "x******x"


def test_words_match_whatever_their_case_and_in_any_script() -> None:
    assert whole(rules(deny_output=["Straße", "绝密", "ЖУК"]), "STRAßE 绝密文件 жук")[0] == "*** ***文件 ***"


def test_pieces_may_hold_half_a_surrogate_pair() -> None:
    assert whole(rules(deny_output=["b"], deny_output_patterns=["[^x]d"], pii_output="mask"), "a\ud800b\udfffd")[0] == "a\ud800******"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a+", r"without end because of `\+`"),
        ("x(a|b*)y", r"`\*`"),
        ("(a{2,}){3}", r"\{2,\}"),
        (".*", "without end"),
        ("a(?=b)", "RE2"),
        ("(?<!a)b", "RE2"),
        (r"(a)\1", "RE2"),
        ("(", "RE2"),
        ("a**", "RE2"),
        ("a{1001}", "RE2"),
        ("\ud800", "RE2"),
        (r"\C", "half characters"),
        (r"\b", "no character"),
        ("", "no character"),
        ("(?:" * 150 + "a" + ")" * 150, "nested"),
        ("(?:.{1,900}){1}(?:.{1,900}x){1}" * 3, "too large"),
    ],
)
def test_patterns_that_a_stream_cannot_have_are_refused_with_the_reason(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rules(deny_output_patterns=[pattern])


@pytest.mark.parametrize("word", ["", "  ", "x" * 513])
def test_words_that_make_no_sense_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="denied word"):
        rules(deny_output=[word])


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    for on in ({"pii_output": "mask"}, {"pii_input": "mask"}, {}):
        with pytest.raises(ConfigError, match="'email'"):
            filter_steps(FilterSection(pii_kinds=["e-mail"], **on))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"(?i)code ?name \pL{1,9}", "CodeName Zürich!", "***!"),
        (r"\p{Han}{2}密", "一文件机密。", "一文***。"),
        (r"[[:digit:]]{3}", "a1234", "a***"),
        (r"[]x]y", "]y", "***"),
        (r"[^]x]y", "]yay", "]y***"),
        (r"\Qa.b\E{2}", "a.bb axbb", "*** axbb"),
        (r"\x41\x{1F600}\101", "A😀A", "***"),
        (r"(?s)a.b", "a\nb", "***"),
        ("a.b", "a\nb", "a\nb"),
        (r"(?m)^x$", "y\nx\nz", "y\n***\nz"),
        (r"a{,3}", "a{,3}", "***"),
        (r"(?P<name>ab)|(?i:C)d", "abCDCd", "***CD***"),
        (r"x(?i)y(?-i)z", "xYz xYZ", "*** xYZ"),
        (r"ab\z", "ab ab", "ab ***"),
        (r"\Aab", "ab ab", "*** ab"),
        (r"(?:\b)*ab", "ab", "***"),
        (r"\bclass\b", "class classes subclass", "*** classes subclass"),
    ],
)
def test_patterns_mean_what_they_mean_to_re2(pattern: str, text: str, expected: str) -> None:
    made = rules(deny_output_patterns=[pattern])
    assert whole(made, text)[0] == expected
    assert "".join(stepwise(made, list(text))[0]) == expected


def cpu(rules: Rules, text: str) -> float:
    stream = Stream(rules, lambda kind, action: None)
    start = time.thread_time()
    stream.feed(text)
    stream.finish()
    return time.thread_time() - start


HOSTILE_PATTERNS = [
    "(?:a?){30}a{30}",
    "(?:a|a|b?){1,40}c",
    "(?:(?:a?|b?)(?:a?|b?)){30}x",
    "((((a?){1,5}){1,5}){1,5}){1,5}b",
    "(?:|)" * 60 + "(?:a|b){1,50}c",
]


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS)
def test_hostile_patterns_take_linear_time(pattern: str) -> None:
    made = rules(deny_output_patterns=[pattern])
    cpu(made, "a" * 1000)
    assert cpu(made, "a" * 2**18) < 1


@pytest.mark.parametrize(
    "text",
    ["a", "4111 1111 1111 1111 ", "a@b.co", "1-2 3.", "sk-", "-----BEGIN PRIVATE KEY-----\n" + "A" * 30, "secret", "+1 (", "a.b@c-"],
)
def test_a_mebibyte_of_hostile_text_takes_less_than_a_second(text: str) -> None:
    made = rules(pii_output="mask", deny_output=["secret", "ecres"], deny_output_patterns=[r"\b[a-z]{1,40}-\d{2}\b"])
    assert cpu(made, text * (2**20 // len(text))) < 1


def test_a_token_costs_a_few_microseconds() -> None:
    made = rules(
        pii_output="mask",
        deny_output=[f"forbidden{number}" for number in range(100)],
        deny_output_patterns=[r"\bproject-[a-z]{3,10}\b"],
    )
    stream = Stream(made, lambda kind, action: None)
    tokens = ["The", " quick", " brown", " fox", " (2", "0", "2", "6", ")", " jumps", " over", " a", " la", "zy", " dog", ".\n"] * 500
    for token in tokens:
        stream.feed(token)
    start = time.thread_time()
    for token in tokens:
        stream.feed(token)
    # About 3 µs where nothing else runs.
    assert (time.thread_time() - start) / len(tokens) < 20e-6


def test_states_are_forgotten_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rules(deny_output=("secret", "the end"), pii_output="mask", filter_mask="[gone]")
    text = "Write to ada@example.com, or call +49 30 1234567; the second is not the answer. "
    monkeypatch.setattr(joint, "FOLLOWERS_KEPT", 7)
    for _ in range(2):
        sent, _ = stepwise(made, list(text))
        assert "".join(sent) == "Write to [gone], or call [gone]; the second is not the answer. "
    assert made.joint._kept <= 7


def test_no_more_matches_under_way_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that forgets its states frees nothing as long as the joint states stand there."""
    made = rules(deny_output_patterns=["x[a-z]{0,40}y"], filter_mask="[gone]")
    monkeypatch.setattr(joint, "THREADS_KEPT", 500)
    text = "".join(Random(1).choices("xa", k=400)) + "xy"

    def remembered() -> int:
        return sum(len(position.threads) for state in made.joint._states.values() for position in state.positions)

    sent, _ = stepwise(made, list(text))
    assert "".join(sent).endswith("[gone]")
    assert remembered() <= 500 + 41
    monkeypatch.setattr(joint, "THREADS_KEPT", 10**9)
    stepwise(made, list(text))
    assert remembered() > 2000, "the text has many states"
