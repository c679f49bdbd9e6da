"""RE2's pattern syntax, taken apart as far as an automaton needs it: sequence, choice, repetition, assertion, one character.

RE2 itself says what is a valid pattern, and it says what each one-character piece (`[a-z]`, `\\pL`, `(?i)k`) matches:
such pieces are kept as they were written. Syntax: https://github.com/google/re2/wiki/Syntax
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

MAX_DEPTH = 100

AssertionKind = Literal[
    "begin", "end", "line_begin", "line_end", "word", "no_word", "digit_before", "digit_after", "token_before", "mail_before"
]

BOUNDARIES: dict[str, AssertionKind] = {
    r"(?<!\d)": "digit_before",
    r"(?!\d)": "digit_after",
    r"(?<![A-Za-z0-9_-])": "token_before",
    r"(?<![A-Za-z0-9._%+-])": "mail_before",
}
"""The only looks around, for built-in patterns alone: such a character must not stand beside the match."""


class PatternError(ValueError):
    """Why a pattern can't be used, for a person."""


@dataclass(frozen=True, slots=True)
class Atom:
    """One character that the RE2 pattern `source` matches."""

    source: str


@dataclass(frozen=True, slots=True)
class Assertion:
    kind: AssertionKind


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    part: Node
    least: int
    most: float
    """`math.inf` where it has no end."""
    written: str


Node = Atom | Assertion | Sequence | Choice | Repeat


def width(node: Node) -> float:
    """Most characters that a match has; `math.inf` where there is no end to it."""
    match node:
        case Atom():
            return 1
        case Assertion():
            return 0
        case Sequence(parts):
            return sum(map(width, parts))
        case Choice(parts):
            return max(map(width, parts))
        case Repeat(part, _, most):
            once = width(part)
            return once * most if once else 0


def size(node: Node) -> float:
    """Automaton nodes that the pattern takes once its repetitions are written out."""
    match node:
        case Atom() | Assertion():
            return 1
        case Sequence(parts):
            return sum(map(size, parts))
        case Choice(parts):
            return 1 + sum(map(size, parts))
        case Repeat(part, least, most):
            return (size(part) + 1) * (most if width(part) else max(least, 1))


def endless(node: Node) -> str | None:
    """The first repetition without an end, as it was written."""
    match node:
        case Sequence(parts) | Choice(parts):
            return next((found for part in parts if (found := endless(part)) is not None), None)
        case Repeat(part, _, most, written):
            inner = endless(part)
            return inner if inner is not None else written if math.isinf(most) and width(part) else None
        case _:
            return None


_COUNT = re.compile(r"\{(\d+)(,?)(\d*)\}", re.ASCII)
_GROUP = re.compile(r"\?P?<\w+>", re.ASCII)
_FLAGS = re.compile(r"\?([imsU]*)(-[imsU]+)?([:)])")
_ESCAPE = re.compile(r"\\(?:[pP](?:\{[^}]*\}|.)|x(?:\{[0-9A-Fa-f]+\}|[0-9A-Fa-f]{2})|[0-7]{1,3}|.)", re.DOTALL)
_CLASS_PIECE = re.compile(r"\[:\^?\w+:\]|\\(?:[pPx]\{[^}]*\}|.)|.", re.DOTALL)


class Parser:
    """Parses a pattern that RE2 has accepted. `boundaries` allows the built-in patterns' looks around.

    Raises `PatternError` for what RE2 knows and a stream can't do: `\\C` (one byte), nesting deeper than `MAX_DEPTH`.
    """

    def __init__(self, pattern: str, *, boundaries: bool = False) -> None:
        self._text = pattern
        self._at = 0
        self._flags = frozenset[str]()
        self._depth = 0
        self._quoting = False
        self._boundaries = boundaries

    def parse(self) -> Node:
        node = self._choice()
        if self._at < len(self._text):
            raise PatternError("a parenthesis is closed that was not opened")
        return node

    def _choice(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternError(f"it is nested deeper than {MAX_DEPTH}")
        parts = [self._sequence()]
        while self._peek("|"):
            self._at += 1
            parts.append(self._sequence())
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _peek(self, wanted: str) -> bool:
        return not self._quoting and self._text.startswith(wanted, self._at)

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._text) and not self._peek("|") and not self._peek(")"):
            node = self._piece()
            if node is not None:
                parts.append(self._repeated(node))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self, node: Node) -> Node:
        while not self._quoting and self._at < len(self._text):
            start = self._at
            sign = self._text[start]
            least, most = 0, math.inf
            if sign in "*+?":
                least = 1 if sign == "+" else 0
                most = 1 if sign == "?" else math.inf
                self._at += 1
            elif sign == "{" and (count := _COUNT.match(self._text, start)):
                least = int(count[1])
                most = int(count[3]) if count[3] else math.inf if count[2] else least
                self._at = count.end()
            else:
                break
            written = self._text[start : self._at]
            if self._peek("?"):  # lazy or not: which characters matches cover is the same
                self._at += 1
            node = Repeat(node, least, most, written)
        return node

    def _piece(self) -> Node | None:
        """The next piece; None where only flags or quotes were read."""
        text, start = self._text, self._at
        if self._quoting:
            if text.startswith(r"\E", start):
                self._quoting = False
                self._at += 2
                # A repetition behind the quotation is of its last character: `_literal` has read ahead for it.
                return None
            return self._literal(text[start])
        sign = text[start]
        if sign == "(":
            return self._group()
        if sign == "[":
            return self._class()
        if sign == "\\":
            return self._escape()
        if sign == "^":
            self._at += 1
            return Assertion("line_begin" if "m" in self._flags else "begin")
        if sign == "$":
            self._at += 1
            return Assertion("line_end" if "m" in self._flags else "end")
        if sign == ".":
            self._at += 1
            return self._atom(".")
        return self._literal(sign)

    def _literal(self, character: str) -> Atom:
        self._at += 1
        if self._quoting and self._text.startswith(r"\E", self._at):
            self._quoting = False
            self._at += 2
        return self._atom(rf"\x{{{ord(character):X}}}")

    def _atom(self, source: str) -> Atom:
        flags = "".join(sorted(self._flags & {"i", "s"}))
        return Atom(f"(?{flags}:{source})" if flags else source)

    def _group(self) -> Node | None:
        text = self._text
        if self._boundaries:
            for written, kind in BOUNDARIES.items():
                if text.startswith(written, self._at):
                    self._at += len(written)
                    return Assertion(kind)
        self._at += 1
        outside = self._flags
        if name := _GROUP.match(text, self._at):
            self._at = name.end()
        elif flags := _FLAGS.match(text, self._at):
            self._at = flags.end()
            self._flags = (self._flags | set(flags[1])) - set(flags[2] or "")
            if flags[3] == ")":
                return None  # they hold until the group around them ends
        elif text.startswith("?", self._at):
            raise PatternError("it uses a kind of group that streams can't have (looking around, for one)")
        node = self._choice()
        if not self._peek(")"):
            raise PatternError("a parenthesis is not closed")
        self._at += 1
        self._flags = outside
        return node

    def _class(self) -> Atom:
        text, at = self._text, self._at + 1
        if text.startswith("^", at):
            at += 1
        first = True
        while at < len(text) and (first or text[at] != "]"):
            piece = _CLASS_PIECE.match(text, at)
            assert piece is not None
            at = piece.end()
            first = False
        source = text[self._at : at + 1]
        self._at = at + 1
        return self._atom(source)

    def _escape(self) -> Node | None:
        text = self._text
        sign = text[self._at + 1 : self._at + 2]
        if sign == "Q":
            self._at += 2
            self._quoting = True
            return None
        if sign == "C":
            raise PatternError(r"\C matches half characters")
        kind: AssertionKind | None = {"b": "word", "B": "no_word", "A": "begin", "z": "end"}.get(sign)  # type: ignore[assignment]
        if kind is not None:
            self._at += 2
            return Assertion(kind)
        if sign == "E":
            self._at += 2
            return None
        escape = _ESCAPE.match(text, self._at)
        if escape is None:
            raise PatternError("it ends in a backslash")
        self._at = escape.end()
        return self._atom(escape[0])
