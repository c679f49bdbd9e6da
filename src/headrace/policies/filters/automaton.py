"""A deterministic automaton over one or more patterns, built while it runs, one character at a time.

A state holds every match under way with how long ago it began, so that after each character it is known which
matches end here, and how far back the oldest one reaches that could still become a match: text before that is
final. The subset construction is the usual one (Rabin and Scott, 1959), done lazily as in RE2
(https://swtch.com/~rsc/regexp/regexp3.html); a state is made once and found again by one dictionary look-up per character.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Sized
from typing import Any, Protocol, TypeVar

from headrace.policies.filters.syntax import Assertion, AssertionKind, Atom, Choice, Node, Repeat
from headrace.policies.filters.syntax import Sequence as Parts

_T = TypeVar("_T")

Hit = tuple[int, int, int]
"""A match: which detector, and how many characters ago it began and ended."""

WORD, DIGIT, NEWLINE, EDGE, TOKEN, MAIL = 1, 2, 4, 8, 16, 32

THREADS_KEPT = 400_000
"""Matches under way over all states that are remembered; beyond it the states are forgotten and made anew (about 50 MiB)."""
CHARACTERS_KEPT = 65_536


class Position(Protocol):
    """Where a machine stands in a text: `position[machine.classes[character]]` is where it stands next."""

    @property
    def hits(self) -> tuple[Hit, ...]:
        """Matches that the last character completed, or that it was needed to decide; by their end, the oldest first."""
        ...

    @property
    def hold(self) -> int:
        """How many characters ago the oldest match began that is still under way; 0 if none is."""
        ...

    @property
    def threads(self) -> Sized:
        """Matches under way: what it takes to remember this."""
        ...

    def __getitem__(self, character_class: Any, /) -> Position: ...


class Machine(Protocol):
    """Finds matches in texts; shared by all of them."""

    @property
    def start(self) -> Position: ...

    @property
    def classes(self) -> Classes:
        """Characters that are alike to all patterns have one class."""
        ...

    def end(self, position: Any) -> tuple[Hit, ...]:
        """Matches that the end of the text completes."""
        ...


class Classes(dict[str, Any]):
    """Classes of the characters seen so far."""

    __slots__ = ("_find",)

    def __init__(self, find: Callable[[str], object]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, character: str) -> object:
        if len(self) >= CHARACTERS_KEPT:
            self.clear()
        found = self[character] = self._find(character)
        return found


def bits(character: str) -> int:
    found = 0
    if character.isascii():
        if character.isalnum():
            found |= WORD | TOKEN | MAIL
        if character == "_":
            found |= WORD | TOKEN | MAIL
        if character in ".%+-":
            found |= MAIL
        if character == "-":
            found |= TOKEN
        if character.isdigit():
            found |= DIGIT
        if character == "\n":
            found |= NEWLINE
    return found


def holds(kind: AssertionKind, before: int, after: int) -> bool:
    match kind:
        case "begin":
            return bool(before & EDGE)
        case "end":
            return bool(after & EDGE)
        case "line_begin":
            return bool(before & (EDGE | NEWLINE))
        case "line_end":
            return bool(after & (EDGE | NEWLINE))
        case "word":
            return (before ^ after) & WORD != 0
        case "no_word":
            return (before ^ after) & WORD == 0
        case "digit_before":
            return not before & DIGIT
        case "digit_after":
            return not after & DIGIT
        case "token_before":
            return not before & TOKEN
        case "mail_before":
            return not before & MAIL


def _oldest(thread: tuple[int, int]) -> tuple[int, int]:
    return (-thread[1], thread[0])


def _longest(hit: Hit) -> tuple[int, int, int]:
    which, began, ended = hit
    return (-ended, -began, which)


class State(dict[int, "State"]):
    """A state, with the states that were already seen to follow it by character class."""

    __slots__ = ("before", "ends", "hits", "hold", "machine", "threads")

    def __init__(self, machine: Automaton, threads: tuple[tuple[int, int], ...], before: int, hits: tuple[Hit, ...]) -> None:
        self.machine = machine
        self.threads = threads
        self.before = before
        self.hits = hits
        self.hold = max((age for _, age in threads), default=0)
        self.ends: tuple[Hit, ...] | None = None
        """What the end of the text completes here, once that was asked for."""

    def __missing__(self, character_class: int) -> State:
        after = self.machine.step(self, character_class)
        self[character_class] = after
        return after


class Alphabet:
    """The atoms of several automata, so that a character is classified once for all of them.

    `belongs(source)` makes the test whether a character is one that the RE2 pattern `source` matches.
    """

    def __init__(self, belongs: Callable[[str], Callable[[str], bool]]) -> None:
        self._belongs = belongs
        self._atoms: dict[str, int] = {}
        self._tests: list[Callable[[str], bool]] = []
        self.signatures: list[tuple[int, frozenset[int]]] = []
        """By class: the character's `bits` and the atoms that it belongs to."""
        self._by_signature: dict[tuple[int, frozenset[int]], int] = {}
        self._adding = threading.Lock()
        """Long prompts are read in threads; two classes of one number would stay so for good."""
        self.classes = Classes(self._class_of)

    def atom(self, source: str) -> int:
        found = self._atoms.get(source)
        if found is None:
            assert not self.signatures, "automata are built before they run"
            found = self._atoms[source] = len(self._tests)
            self._tests.append(self._belongs(source))
        return found

    def _class_of(self, character: str) -> int:
        signature = (bits(character), frozenset(atom for atom, test in enumerate(self._tests) if test(character)))
        with self._adding:
            found = self._by_signature.get(signature)
            if found is None:
                self.signatures.append(signature)
                found = self._by_signature[signature] = len(self.signatures) - 1
        return found


class Automaton:
    """All of `patterns` at once; a hit names its pattern by its index."""

    def __init__(self, patterns: Sequence[Node], alphabet: Alphabet) -> None:
        self._alphabet = alphabet
        self.classes = alphabet.classes
        # Per node: (atom, next), (assertion, next), several nexts, or the pattern that is matched.
        self._consume: dict[int, tuple[int, int]] = {}
        self._assert: dict[int, tuple[AssertionKind, int]] = {}
        self._fork: dict[int, tuple[int, ...]] = {}
        self._accept: dict[int, int] = {}
        self._count = 0
        self._roots = tuple((self._build(pattern, self._put(self._accept, index)), 0) for index, pattern in enumerate(patterns))
        self._states: dict[tuple[object, ...], State] = {}
        self._kept = 0
        self.start = State(self, (), EDGE, ())

    def _put(self, kind: dict[int, _T], value: _T) -> int:
        self._count += 1
        kind[self._count] = value
        return self._count

    def _build(self, node: Node, following: int) -> int:
        match node:
            case Atom(source):
                return self._put(self._consume, (self._alphabet.atom(source), following))
            case Assertion(kind):
                return self._put(self._assert, (kind, following))
            case Parts(parts):
                for part in reversed(parts):
                    following = self._build(part, following)
                return following
            case Choice(parts):
                return self._put(self._fork, tuple(self._build(part, following) for part in parts))
            case Repeat(part, least, most):
                entry = following
                # What has no width is not worth repeating; what has one has an end, `rules` has seen to that.
                for _ in range(int(min(most, 1000)) - least if most != float("inf") else 1):
                    entry = self._put(self._fork, (self._build(part, entry), following))
                for _ in range(least):
                    entry = self._build(part, entry)
                return entry

    def step(self, state: State, character_class: int) -> State:
        after, atoms = self._alphabet.signatures[character_class]
        live: dict[int, int] = {}
        hits: set[Hit] = set()
        # First what waited to see this character: assertions, and matches that may begin here.
        ready = self._resolve(state, after, hits)
        seen: set[int] = set()
        for node, age in ready:
            atom, following = self._consume[node]
            if atom in atoms:
                self._close(following, age + 1, live, hits, seen)
        key = (tuple(sorted(live.items(), key=_oldest)), after, tuple(sorted(hits, key=_longest)))
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = State(self, key[0], after, key[2])
            self._kept += 1 + len(live)
            if self._kept > THREADS_KEPT:
                self._states.clear()
                self._kept = 0
                self.start.clear()
        return found

    def end(self, state: State) -> tuple[Hit, ...]:
        if state.ends is None:
            hits: set[Hit] = set()
            self._resolve(state, EDGE, hits)
            state.ends = tuple((which, began - 1, 0) for which, began, _ in sorted(hits, key=_longest))
        return state.ends

    def _resolve(self, state: State, after: int, hits: set[Hit]) -> list[tuple[int, int]]:
        """Everything that may consume the next character, with its age before it, oldest first; and the matches that end before it."""
        ready: list[tuple[int, int]] = []
        seen: set[int] = set()
        for thread, age in (*state.threads, *self._roots):
            stack = [thread]
            while stack:
                node = stack.pop()
                if node in seen:
                    continue  # an older match has been there, and covers all that this one would
                seen.add(node)
                if node in self._consume:
                    ready.append((node, age))
                elif node in self._fork:
                    stack += self._fork[node]
                elif node in self._assert:
                    kind, following = self._assert[node]
                    if holds(kind, state.before, after):
                        stack.append(following)
                elif age:
                    hits.add((self._accept[node], age + 1, 1))
        return ready

    def _close(self, node: int, age: int, live: dict[int, int], hits: set[Hit], seen: set[int]) -> None:
        """What a match reaches without a further character; assertions wait for it."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._fork:
                stack += self._fork[node]
            elif node in self._accept:
                hits.add((self._accept[node], age, 0))
            else:
                live[node] = age
