"""The text of a completion as it becomes certain, and the stop strings that end it.

Text is held back only while a stop string may be under way: the longest end of the text that begins one. The
outcome doesn't depend on how the text is cut into pieces: the stop string that is complete first wins, and of
those that end with the same character the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """One stop string, matched a character at a time (Knuth, Morris, Pratt 1977)."""

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """Characters of `text` that the end of what was read so far matches."""
        self._fallback = [0] * len(text)
        length = 0
        for at in range(1, len(text)):
            while length and text[at] != text[length]:
                length = self._fallback[length - 1]
            if text[at] == text[length]:
                length += 1
            self._fallback[at] = length

    def read(self, piece: str) -> int:
        """Read on; the index just after the first complete match within `piece`, or -1."""
        text, fallback, matched = self.text, self._fallback, self.matched
        at, end = 0, len(piece)
        while at < end:
            if matched == 0:
                at = piece.find(text[0], at)
                if at < 0:
                    break
            character = piece[at]
            while matched and character != text[matched]:
                matched = fallback[matched - 1]
            if character == text[matched]:
                matched += 1
                if matched == len(text):
                    self.matched = matched
                    return at + 1
            at += 1
        self.matched = matched
        return -1


class StopStrings:
    """Watches the text of one completion for stop strings; empty stop strings are ignored."""

    __slots__ = ("_held", "_patterns")

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in dict.fromkeys(stops) if stop]
        self._held = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that matched. After a match nothing may be pushed."""
        first, winner = len(piece) + 1, ""
        for pattern in self._patterns:
            end = pattern.read(piece)
            if end >= 0 and (end < first or (end == first and len(pattern.text) > len(winner))):
                first, winner = end, pattern.text
        if winner:
            text = self._held + piece[:first]
            self._held = ""
            return text[: len(text) - len(winner)], winner
        text = self._held + piece
        keep = max((pattern.matched for pattern in self._patterns), default=0)
        self._held = text[len(text) - keep :] if keep else ""
        return (text[: len(text) - keep] if keep else text), None

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held
