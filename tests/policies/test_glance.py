"""The quick look at whole texts: where it sees nothing there is nothing, as the machines find it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import FilterSection
from headrace.policies.filters.glance import EACH_ALONE, MOST_WORDS, Glance, weaker
from headrace.policies.filters.personal import PERSONAL
from headrace.policies.filters.rules import finite, input_rules, parsed
from headrace.policies.filters.stream import Rules, Stream

WORDS = ["forbidden fruit", "Straße", "ſecret", "İst", "的话"]
_LOOKING = re.compile(r"\(\?<?!(?:[^()\\]|\\.)*\)")
_PERSONAL = [_LOOKING.sub("", pattern) for kinds in PERSONAL.values() for each in kinds for pattern in each.patterns]


def _rules(words: list[str]) -> Rules:
    rules = input_rules(FilterSection(deny_input=words, pii_input="mask"))
    assert rules is not None
    return rules


RULES = _rules(WORDS)
MANY = _rules([*WORDS, *(f"word {number}" for number in range(EACH_ALONE))])


def _acts(rules: Rules, text: str) -> bool:
    found: list[str] = []
    stream = Stream(rules, lambda kind, action: found.append(kind))
    stream.feed(text)
    if not stream.blocked:
        stream.finish()
    return bool(found)


_PIECES = st.one_of(
    *(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True) for pattern in _PERSONAL),
    st.sampled_from([*WORDS, *map(str.upper, WORDS), "FORBIDDEN", "ss", "K", "i̇st", "word 3", "strasse"]),
    st.text(alphabet="09 -@.+()abKkſßẞİıA_\n的", max_size=12),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(_PIECES, max_size=4))
def test_what_the_machines_find_is_seen(pieces: list[str]) -> None:
    text = "".join(pieces)
    for rules in (RULES, MANY):
        assert rules.glance is not None
        if _acts(rules, text):
            assert rules.glance(text)


@pytest.mark.parametrize("text", ["", "Tell me of the year 2026, and of 1066.", "an @ alone, sk-ip it", "你好，世界", "fruit forbidden"])
def test_ordinary_texts_are_done_with(text: str) -> None:
    for rules in (RULES, MANY):
        assert rules.glance is not None
        assert not rules.glance(text)


def test_half_a_surrogate_pair_is_left_to_the_machines() -> None:
    assert RULES.glance is not None
    assert RULES.glance("\ud800")


def test_more_words_than_it_can_look_for_are_left_to_the_machines() -> None:
    assert Glance([f"word {number}" for number in range(MOST_WORDS + 1)], [])("nothing")


@pytest.mark.parametrize(
    ("pattern", "weak"),
    [
        (r"a{2,9}b", r"(?:\x{61}){2}\x{62}"),
        (r"x?ab{0,40}c?", r"\x{61}"),
        (r"a[bc]{1,40}d", r"\x{61}(?:[bc]){1,}\x{64}"),
        (r"\bab{1,2}c$", r"\x{61}(?:\x{62}){1,2}\x{63}"),
        (r"(?:a|b{1,5})c", r"(?:\x{61}|(?:\x{62}){1})\x{63}"),
    ],
)
def test_patterns_are_weakened_at_their_ends(pattern: str, weak: str) -> None:
    assert weaker(finite(pattern)) == weak


def test_every_built_in_pattern_demands_something() -> None:
    assert all(weaker(node) for kinds in PERSONAL.values() for each in kinds for node in parsed(each))
