"""Which tokens a step draws, from which row of the model's output."""

from __future__ import annotations

from functools import cached_property

from headrace.engine.batch import Guesses
from headrace.engine.sampler import SequenceSampler
from headrace.engine.scheduler import Chunk
from headrace.engine.sequence import Sequence


class Draw:
    """The rows of a batch, decodes first and then chunks, and what each is for. There are guesses only where there are no chunks."""

    def __init__(self, decodes: list[Sequence], chunks: list[Chunk], guesses: Guesses | None = None) -> None:
        self.sequences = decodes
        """Those that get a token, each from its entry in `rows`, or in order where that is None."""
        self.rows: list[int] | None = None
        self.first: list[Sequence] = []
        """Those whose tokens are all computed with this step."""
        self.scored: list[tuple[Chunk, int]] = []
        """Chunks with positions to score, and the row of the first."""
        self.forks: list[tuple[Sequence, list[Sequence]]] = []
        self.leaders: list[Sequence] = []
        """First choices whose siblings begin with this step, from the same row."""
        self.ahead: list[int] | None = None
        """Where there are guesses, how many tokens after its sequence's next each token is."""
        self.guesses: list[int | None] | None = None
        """What each token must be for the following one, of the same sequence, to stand."""
        self._row_of: dict[int, int] = {}
        if guesses is not None:
            self.sequences = [sequence for sequence, some in zip(decodes, guesses, strict=True) for _ in range(len(some) + 1)]
            self.ahead = [ahead for some in guesses for ahead in range(len(some) + 1)]
            self.guesses = [guess for some in guesses for guess in (*some, None)]
        if not chunks:
            return
        self.sequences = list(decodes)
        row = len(decodes)
        self.rows = list(range(row))
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.scored:
                self.scored.append((chunk, row))
            row += chunk.rows
            if chunk.last:
                self.first.append(sequence)
                if sequence.completion is not None:
                    self.sequences.append(sequence)
                    self.rows.append(row - 1)
                    if not sequence.job.forked:
                        self.leaders.append(sequence)
                        self._row_of[id(sequence)] = row - 1

    def add(self, leader: Sequence, siblings: list[Sequence]) -> None:
        """Draw the siblings' first tokens from their leader's row."""
        self.forks.append((leader, siblings))
        self.sequences += siblings
        if self.rows is not None:
            self.rows += [self._row_of[id(leader)]] * len(siblings)

    @cached_property
    def samplers(self) -> list[SequenceSampler]:
        """One for each of `sequences`. To be read once all siblings are there."""
        return [sequence.completion.sampler for sequence in self.sequences if sequence.completion is not None]

    @property
    def best_only(self) -> bool:
        """Whether each row's likeliest token is all that is asked of it."""
        return not self.scored and all(sampler.takes_best for sampler in self.samplers)
