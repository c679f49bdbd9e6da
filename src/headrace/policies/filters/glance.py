"""One look at a whole text by RE2: whether there may be anything in it at all, before an automaton reads it character by character.

Nearly no text has a match. A pattern is weakened to one that RE2 knows (it can't look around) and that is found wherever the pattern is;
where that isn't found either, the text is done with in a few microseconds. What is found is left to the automata, which are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.policies.filters.syntax import Assertion, Atom, Choice, Node, Repeat, width
from headrace.policies.filters.syntax import Sequence as Parts
from headrace.policies.filters.words import fold

COUNTED = 16
"""Repetitions beyond this are weakened to any number: RE2 would take a state for each."""
EACH_ALONE = 8
"""Up to so many words are looked for one by one, which is faster than RE2."""
MOST_WORDS = 512
"""With more of them RE2 could run out of states, and be slower than the automaton."""
MEMORY = 16 * 1048576
"""Bytes that RE2 may take for the states of one expression."""


class Glance:
    """Looks for denied `words`, whatever their case, and for `patterns`. Called with a text: False is certain, True is not."""

    def __init__(self, words: Sequence[str], patterns: Sequence[Node]) -> None:
        folded = sorted({"".join(map(fold, word)) for word in words})
        self._blind = len(folded) > MOST_WORDS
        self._each = folded if len(folded) <= EACH_ALONE else []
        self._words = _expression([_quoted(word) for word in folded]) if EACH_ALONE < len(folded) <= MOST_WORDS else None
        self._patterns = _expression([weaker(pattern) for pattern in patterns]) if patterns else None
        self._blind |= len(folded) > EACH_ALONE and self._words is None
        self._blind |= bool(patterns) and self._patterns is None

    def __call__(self, text: str) -> bool:
        if self._blind:
            return True
        if self._each or self._words is not None:
            folded = _folded(text)
            for word in self._each:
                if word in folded:
                    return True
            if self._words is not None and _found(self._words, folded):
                return True
        return self._patterns is not None and _found(self._patterns, text)


def weaker(node: Node, *, first: bool = True, last: bool = True) -> str:
    """An RE2 expression that is found in every text in which the pattern matches.

    Assertions are left out. A repetition that begins the pattern (`first`) or ends it (`last`) is as short as it may be: the rest of the
    match is a match of that.
    """
    match node:
        case Atom(source):
            return source
        case Assertion():
            return ""
        case Choice(parts):
            return f"(?:{'|'.join(weaker(part, first=first, last=last) for part in parts)})"
        case Repeat(part, least, most):
            if not width(part) or ((first or last) and not least):
                return ""
            inner = f"(?:{weaker(part, first=False, last=False)})"
            if first or last:
                return f"{inner}{{{least}}}"
            return f"{inner}{{{least},}}" if most > COUNTED else f"{inner}{{{least},{int(most)}}}"
        case Parts(parts):
            begin, end = 0, len(parts)
            while begin < end and first and _may_be_nothing(parts[begin]):
                begin += 1
            while begin < end and last and _may_be_nothing(parts[end - 1]):
                end -= 1
            inside = enumerate(parts[begin:end], begin)
            return "".join(weaker(part, first=first and at == begin, last=last and at == end - 1) for at, part in inside)


def _may_be_nothing(node: Node) -> bool:
    return isinstance(node, Assertion) or (isinstance(node, Repeat) and not (node.least and width(node.part)))


def _quoted(word: str) -> str:
    return "".join(rf"\x{{{ord(character):X}}}" for character in word)


def _expression(alternatives: Sequence[str]) -> Any:
    """None where RE2 finds them too much."""
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = MEMORY
    try:
        return re2.compile("|".join(alternatives), options)
    except (re2.error, UnicodeEncodeError):
        return None


def _found(expression: Any, text: str) -> bool:
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return True
    return expression.search(encoded) is not None


def _folded(text: str) -> str:
    """As `fold` folds each of its characters."""
    if text.isascii():
        return text.lower()
    folded = text.casefold()
    # No character folds to nothing, so that with as many as before each has become one.
    return folded if len(folded) == len(text) else "".join(map(fold, text))
