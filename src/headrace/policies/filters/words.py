"""Many words at once: Aho and Corasick's automaton (CACM 1975), which also knows how much of a word is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from headrace.policies.filters.automaton import Classes, Hit

FOLLOWERS_KEPT = 256


class WordState(dict[str, "WordState"]):
    """A node of the trie: the longest beginning of a word that the text ends with."""

    __slots__ = ("fallback", "hits", "hold")
    threads: ClassVar[tuple[()]] = ()
    """Nothing is remembered for a state: all of them are there from the beginning."""

    def __init__(self) -> None:
        self.fallback: WordState = self
        self.hits: tuple[Hit, ...] = ()
        self.hold = 0

    def __missing__(self, character: str) -> WordState:
        state = self
        while character not in state and state.fallback is not state:
            state = state.fallback
        found = dict.get(state, character, state)
        if state is not self and len(self) < FOLLOWERS_KEPT:
            self[character] = found
        return found


class Words:
    """Finds words anywhere in a text, whatever their case."""

    def __init__(self, words: Sequence[str]) -> None:
        self.start = WordState()
        self.classes = Classes(fold)
        for index, word in enumerate(words):
            state = self.start
            for character in map(fold, word):
                following = dict.get(state, character)
                if following is None:
                    following = state[character] = WordState()
                state = following
            state.hits = ((index, len(word), 0),)
        self._link()

    def _link(self) -> None:
        queue = deque((self.start, child, character, 1) for character, child in self.start.items())
        for child in self.start.values():
            child.fallback = self.start
        while queue:
            parent, state, character, depth = queue.popleft()
            if parent is not self.start:
                state.fallback = parent.fallback[character]
            # The longest word that ends here covers the others; a beginning counts as such only while it can go on.
            state.hits = state.hits or state.fallback.hits
            state.hold = depth if state else state.fallback.hold
            queue.extend((state, child, following, depth + 1) for following, child in state.items())

    def end(self, position: WordState) -> tuple[Hit, ...]:
        return ()


def fold(character: str) -> str:
    """One character for one, so that positions stay."""
    folded = character.casefold()
    return folded if len(folded) == 1 else character
