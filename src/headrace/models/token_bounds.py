"""Sure lower bounds on how many tokens a text has, without tokenizing it.

Whatever way a text is cut into tokens, a token that holds byte b is at most `longest[b]` bytes long, so that byte alone
accounts for at least 1/longest[b] tokens. The sum over all bytes is a lower bound; it takes a histogram.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

_CHARACTERS_AT_A_TIME = 1 << 17
"""Encoding and counting that many holds the GIL well under a millisecond."""


class TokenBounds:
    """`shrink`: how many times shorter normalizing may make a text, in bytes: 1 for tokenizers that don't normalize, 3 for
    NFC (three Hangul jamo of nine bytes become a syllable of three), 0 where nothing is known and no bound is sure."""

    def __init__(self, tokens: Iterable[bytes], shrink: int) -> None:
        known = [token for token in tokens if token]
        lengths = np.array([len(token) for token in known], dtype=np.int64)
        longest: NDArray[np.int64] = np.ones(256, dtype=np.int64)
        if known:
            np.maximum.at(longest, np.frombuffer(b"".join(known), dtype=np.uint8), np.repeat(lengths, lengths))
        self._weights: NDArray[np.float64] = 1.0 / longest
        self._longest = int(longest.max())
        self._shrink = shrink

    def at_least(self, text: str, start: int = 0) -> int:
        """Tokens that `text[start:]` has at the least, to whatever it is added."""
        return self._sum(_histograms(text, start))

    def exceeds(self, text: str, limit: int) -> int:
        """A sure lower bound above `limit`, as soon as one is certain; 0 if none is."""
        total: NDArray[np.int64] = np.zeros(256, dtype=np.int64)
        for histogram in _histograms(text, 0):
            total += histogram
            found = self._bound(total)
            if found > limit:
                return found
        return 0

    def _sum(self, histograms: Iterator[NDArray[np.int64]]) -> int:
        total: NDArray[np.int64] = np.zeros(256, dtype=np.int64)
        for histogram in histograms:
            total += histogram
        return self._bound(total)

    def _bound(self, histogram: NDArray[np.int64]) -> int:
        if self._shrink == 0:
            return 0
        if self._shrink == 1 or not histogram[128:].any():
            bound = float(histogram @ self._weights)
        else:
            # Composing takes ASCII letters in: at most one for each mark, which has two bytes or more.
            other = int(histogram[128:].sum())
            bound = max(0.0, float(histogram[:128] @ self._weights[:128]) - other / 2) + other / self._shrink / self._longest
        return int(bound * (1 - 1e-9))


def _histograms(text: str, start: int) -> Iterator[NDArray[np.int64]]:
    for at in range(start, len(text), _CHARACTERS_AT_A_TIME):
        raw = text[at : at + _CHARACTERS_AT_A_TIME].encode("utf-8", "surrogatepass")
        yield np.bincount(np.frombuffer(raw, dtype=np.uint8), minlength=256)
