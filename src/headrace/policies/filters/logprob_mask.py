"""Keeps log-probabilities in step with a filtered text: an entry shows only what the text shows, and no earlier."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.policies.filters.automaton import Position
from headrace.policies.filters.stream import Stream
from headrace.types import TokenLogprob

HIDDEN_TOKEN = -1


@dataclass(slots=True)
class _Placed:
    """An entry with its place in the text: characters from `start` to `end`, of which `own` came complete with this token."""

    entry: TokenLogprob
    start: int
    end: int
    own: str
    hidden: bool
    positions: tuple[Position, ...]


class LogprobMask:
    """One choice's text and log-probabilities, through a `Stream`.

    Tokens are matched with the text by their bytes. One whose bytes are not in the text (a control token, a stop string) shows
    nothing. Of an alternative that would have completed a match, only the log-probability is shown.
    """

    def __init__(self, stream: Stream, mask: str) -> None:
        self._stream = stream
        self._mask = mask
        self._masked: list[tuple[int, int]] = []
        stream.masked = self._masked
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: deque[TokenLogprob] = deque()
        self._placed: deque[_Placed] = deque()
        self._cursor = 0
        self._current: _Placed | None = None
        self._rest = ""
        """What of the current token's text has not come yet."""
        self._lost = False
        """Text came that no token explains; from there on nothing can be placed."""

    def feed(self, text: str, entries: Sequence[TokenLogprob]) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The next piece and the next tokens; the text may trail the tokens. What can be sent of both."""
        self._waiting.extend(entries)
        sent: list[str] = []
        while self._current is not None or self._waiting:
            current = self._current if self._current is not None else self._take()
            known = min(len(self._rest), len(text))
            if self._lost or self._rest[:known] != text[:known]:
                self._decoder.reset()
                self._place(current, hidden=True)
                continue
            self._move(text[:known], sent)
            current.own += text[:known]
            text, self._rest = text[known:], self._rest[known:]
            if self._rest:
                break
            self._place(current, hidden=False)
        if text:
            self._lost = True
            self._move(text, sent)
        return "".join(sent), self._release(self._stream.base)

    def finish(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The rest of both, now that the text has ended."""
        text = self._stream.finish()
        if self._stream.blocked:
            return text, self._release(self._stream.base)
        while self._current is not None or self._waiting:
            self._place(self._current if self._current is not None else self._take(), hidden=True)
        return text, self._release(self._stream.seen + 1)

    def _take(self) -> _Placed:
        entry = self._waiting.popleft()
        positions = self._stream.positions if entry.top else ()
        self._current = _Placed(entry, self._cursor, self._cursor, "", False, positions)
        self._rest = self._decoder.decode(entry.raw or entry.text.encode("utf-8", "surrogatepass"))
        return self._current

    def _move(self, text: str, sent: list[str]) -> None:
        if text and not self._stream.blocked:
            sent.append(self._stream.feed(text))
            self._cursor += len(text)

    def _place(self, current: _Placed, *, hidden: bool) -> None:
        half = bool(self._decoder.getstate()[0])
        current.end = self._cursor + half
        current.hidden = hidden
        self._placed.append(current)
        self._current, self._rest = None, ""

    def _release(self, front: int) -> tuple[TokenLogprob, ...]:
        released: list[TokenLogprob] = []
        while self._placed and self._placed[0].end <= front:
            released.append(self._shown(self._placed.popleft()))
        oldest = self._placed[0].start if self._placed else self._cursor
        self._masked[:] = [run for run in self._masked if run[1] > oldest]
        return tuple(released)

    def _shown(self, placed: _Placed) -> TokenLogprob:
        entry = placed.entry
        runs = [run for run in self._masked if run[0] < placed.end and placed.start < run[1]]
        if runs or placed.hidden:
            text = self._render(placed, dict(runs))
            return TokenLogprob(HIDDEN_TOKEN, entry.logprob, text, text.encode("utf-8", "surrogatepass"))
        if not any(self._stream.would_match(placed.positions, top[2]) for top in entry.top):
            return entry
        hidden = self._mask.encode()
        top = tuple(
            (HIDDEN_TOKEN, other[1], self._mask, hidden) if self._stream.would_match(placed.positions, other[2]) else other
            for other in entry.top
        )
        return TokenLogprob(entry.token, entry.logprob, entry.text, entry.raw, top)

    def _render(self, placed: _Placed, runs: dict[int, int]) -> str:
        """The token's part of the masked text: a match's mask goes to the token in which it begins."""
        shown: list[str] = []
        for place, character in enumerate(placed.own, placed.start):
            if place in runs:
                shown.append(self._mask)
            elif not any(start < place < end for start, end in runs.items()):
                shown.append(character)
        return "".join(shown)
