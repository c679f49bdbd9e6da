"""Guesses the next tokens of a sequence from what followed the same words earlier in it, for one step to verify.

Prompt lookup decoding (Saxena, 2023) needs no second model: answers repeat names and phrases of their prompt and of
themselves. Every guess is one more row of the step, and the token that is drawn from the row before it says whether it
was right, so that what is sampled stays exactly what would have been sampled one token at a time.

A guess costs time even where it is wrong. How often a sequence's guesses come true is followed, and a guess is made
where it is likelier to come true than the token it saves is dear: see `worth`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

REACH = 4096
"""Tokens of a prompt's end that are looked through."""
MOST = 12
"""Guesses for a sequence in one step."""
MOST_ROWS = 32
"""Guesses of all sequences in one step: bounds how much longer a step gets for those who wait for its end."""
FIRST_TRUST = 0.6
"""What a new sequence's guesses are trusted with; about what they deserve in greedy text."""
FIXED = 12.0
"""What a step costs before its rows, in rows. 13 for 135M parameters on 2 cores with AVX-512, less for larger models. It isn't measured
at start: the number of rows shows in a product's last bits, and the same request should give the same text after a restart."""
_RATE = 0.1
_SURE = 0.98
_KEEP = 4 * REACH


class Lookup:
    """The words of one sequence, and what has followed them. `tokens` are those so far."""

    __slots__ = ("_coming", "_places", "_tokens", "trust")

    def __init__(self, tokens: Sequence[int]) -> None:
        self.trust = FIRST_TRUST
        """How likely the next guess is to come true, from those before."""
        self._coming: list[int] = []
        """Guesses that the next tokens will judge."""
        self._read(tokens)

    def _read(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens[-REACH:])
        # Later places replace earlier ones: what was said last is likeliest to be said again.
        self._places = {pair: place for place, pair in enumerate(zip(self._tokens[:-2], self._tokens[1:-1], strict=True), 2)}

    def take(self, token: int) -> None:
        """A token has been drawn."""
        if self._coming:
            right = self._coming.pop(0) == token
            self.trust += _RATE * (right - self.trust)
            if not right:
                self._coming.clear()
        tokens = self._tokens
        if len(tokens) >= 2:
            self._places[tokens[-2], tokens[-1]] = len(tokens)
        tokens.append(token)
        if len(tokens) > _KEEP:
            self._read(tokens)

    def guess(self, most: int, least: float) -> list[int]:
        """At most `most` tokens that may follow now, each of them right with a probability of `least` or more.

        As many as the words before them agree in: the longer a passage has been repeated, the further it will be.
        """
        tokens = self._tokens
        place = self._places.get((tokens[-2], tokens[-1])) if len(tokens) >= 2 else None
        if place is None:
            self._coming.clear()
            return []
        agree, back = 2, place - 3
        while agree < MOST and back >= 0 and tokens[back] == tokens[-agree - 1]:
            agree += 1
            back -= 1
        count = min(agree, most, int(math.log(least) / math.log(min(self.trust, _SURE))) if self.trust > 0 else 0)
        # One guess at least is remembered and judged, so that trust can come back.
        coming = tokens[place : place + max(count, 1)]
        while len(coming) < count:
            # The passage runs into its own repetition.
            coming.append(coming[len(coming) - (len(tokens) - place)])
        self._coming = coming
        return coming[:count]


def worth(sequences: int) -> float:
    """How likely a guess has to be, in a step of so many sequences, to save more time than it takes.

    A step of n sequences takes `FIXED + n`, so a token `(FIXED + n) / n`, and a guess 1.
    """
    return sequences / (sequences + FIXED)
