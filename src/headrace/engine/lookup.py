"""Guesses the next tokens of a sequence from what followed the same words earlier in it, for one step to verify.

Prompt lookup decoding (Saxena, 2023) needs no second model: answers repeat names and phrases of their prompt and of
themselves. Every guess is one more row of the step, and the token that is drawn from the row before it says whether it
was right, so that what is sampled stays exactly what would have been sampled one token at a time.

Rows cost time even where their guesses are wrong, and a step with another number of rows than the one before costs more
than several rows do: OpenVINO prepares hundreds of operations anew (4 to 5 ms for 135M parameters on 2 cores). So all steps of a small
batch have the same number of guesses, filled up with anything, as long as guesses come true often enough, and else none;
larger batches are never guessed for.
"""

from __future__ import annotations

from collections.abc import Sequence

REACH = 4096
"""Tokens of a prompt's end that are looked through."""
WIDTHS = {1: 3, 2: 2, 3: 1}
"""Guesses for each sequence, by the number of sequences that decode."""
LEAST = 0.25
"""Share of tokens that guesses have to foresee, for them to be made: below it they cost more than they save."""
FIRST_SHARE = 0.4
"""That share for a new sequence."""
_RATE = 0.06
_KEEP = 4 * REACH


class Lookup:
    """The words of one sequence, and what has followed them. `tokens` are those so far."""

    __slots__ = ("_asked", "_coming", "_places", "_tokens", "share")

    def __init__(self, tokens: Sequence[int]) -> None:
        self.share = FIRST_SHARE
        """Of the tokens of late, those that were foreseen."""
        self._asked = False
        self._coming: list[int] = []
        """Guesses that the next tokens will judge."""
        self._read(tokens)

    def _read(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens[-REACH:])
        # Later places replace earlier ones: what was said last is likeliest to be said again.
        self._places = {pair: place for place, pair in enumerate(zip(self._tokens[:-2], self._tokens[1:-1], strict=True), 2)}

    def take(self, token: int) -> None:
        """A token has been drawn."""
        if self._asked:
            right = bool(self._coming) and self._coming.pop(0) == token
            self.share += _RATE * (right - self.share)
            if not right:
                self._coming.clear()
            self._asked = bool(self._coming)
        tokens = self._tokens
        if len(tokens) >= 2:
            self._places[tokens[-2], tokens[-1]] = len(tokens)
        tokens.append(token)
        if len(tokens) > _KEEP:
            self._read(tokens)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may follow now: what followed the last two tokens when they were last said."""
        tokens = self._tokens
        place = self._places.get((tokens[-2], tokens[-1])) if len(tokens) >= 2 else None
        self._asked = True
        if place is None:
            self._coming = []
            return []
        # One guess at least is remembered and judged, so that it shows when guesses would be worth their while again.
        coming = tokens[place : place + max(most, 1)]
        while len(coming) < most:
            # The passage runs into its own repetition.
            coming.append(coming[len(coming) - (len(tokens) - place)])
        self._coming = list(coming)
        return coming[:most]
