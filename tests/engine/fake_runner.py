"""A runner whose model is a hash of the token history, which it reads back through the block tables.

Its KV blocks hold token ids and positions, so that a wrong block table, a stale block, a wrong `past_lens` or a block
shared by mistake gives other tokens, or fails an assertion. Beside it, a tokenizer of single characters.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.ports import ForwardBatch

VOCABULARY = 96
EOS = 0
LETTERS = "".join(chr(32 + token) for token in range(VOCABULARY))


class FakeResult:
    """With `best_only`, nothing of it but the likeliest tokens can be used."""

    def __init__(self, logits: NDArray[np.float32], best_only: bool = False) -> None:
        self._logits = logits
        self.top_ids = np.argsort(-logits, axis=1, kind="stable")[:, :64].astype(np.int64)
        self.top_logits = np.take_along_axis(logits, self.top_ids, axis=1)
        highest = logits.max(axis=1, initial=0)
        self.logsumexp = (np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest).astype(np.float32)
        self._best_only = best_only
        if best_only:
            self.top_ids, self.top_logits = self.top_ids[:, :1], self.top_logits[:, :1]
            self.logsumexp = np.full_like(self.logsumexp, 1e6)

    def logits(self, row: int) -> NDArray[np.float32]:
        assert not self._best_only
        return self._logits[row].copy()


def next_logits(history: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
    """The model: what follows a history."""
    seed = zlib.crc32(np.asarray(history, np.int64).tobytes())
    logits = np.random.Generator(np.random.Philox(seed)).normal(size=VOCABULARY).astype(np.float32) * 3
    logits[EOS] -= 3
    return logits


def greedy(prompt: Sequence[int], count: int, *, ignore_eos: bool = True, memory: int = 0) -> list[int]:
    """What a greedy completion of `prompt` must be."""
    history = list(prompt)
    while len(history) < len(prompt) + count:
        history.append(int(np.argmax(next_logits(history[-memory:]))))
        if history[-1] == EOS and not ignore_eos:
            break
    return history[len(prompt) :]


class FakeRunner:
    """`memory`: the model looks at so many tokens only, and repeats itself; such a runner can try tokens out. 0 is all."""

    def __init__(self, *, num_blocks: int = 64, block_size: int = 4, memory: int = 0) -> None:
        self.memory = memory
        self.rewinds = memory > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = VOCABULARY
        self.ids = np.full((num_blocks, block_size), -1, np.int64)
        self.positions = np.full((num_blocks, block_size), -1, np.int64)
        self.sizes: list[list[int]] = []
        """Of each step, the tokens of each sequence."""
        self.best_only: list[bool] = []
        """Of each step, whether nothing but the likeliest tokens was wanted."""
        self.copies = 0
        self.poison: int | None = None
        """A token that no step can compute."""
        self.broken = False
        self.meanwhile: Callable[[], None] | None = None

    def forward(self, batch: ForwardBatch) -> FakeResult:
        assert not self.broken, "the device is gone"
        if self.meanwhile is not None:
            self.meanwhile()
        assert batch.input_ids.dtype == batch.position_ids.dtype == batch.rows.dtype == np.int64
        assert batch.past_lens.dtype == batch.block_indices.dtype == np.int32
        assert batch.subsequence_begins.dtype == batch.block_indices_begins.dtype == np.int32
        if self.poison is not None and self.poison in batch.input_ids:
            raise ValueError("poison")
        count = len(batch.past_lens)
        assert len(batch.subsequence_begins) == len(batch.block_indices_begins) == count + 1
        assert batch.subsequence_begins[-1] == len(batch.input_ids) == len(batch.position_ids)
        assert batch.block_indices_begins[-1] == len(batch.block_indices)
        self.sizes.append(np.diff(batch.subsequence_begins).tolist())
        histories: dict[int, NDArray[np.int64]] = {}
        written: set[tuple[int, int]] = set()
        longest = 0
        tables = []
        for number in range(count):
            begin, end = batch.subsequence_begins[number : number + 2]
            past = int(batch.past_lens[number])
            table = batch.block_indices[batch.block_indices_begins[number] : batch.block_indices_begins[number + 1]]
            total = past + end - begin
            longest = max(longest, total)
            # Blocks that will be needed soon may be there already.
            assert len(table) == -(-total // self.block_size) or (self.rewinds and len(table) > total // self.block_size)
            places = np.arange(past, total)
            blocks = table[places // self.block_size]
            there = {(block, place if self.rewinds else 0) for block, place in zip(blocks.tolist(), places.tolist(), strict=True)}
            assert not written & there, "two sequences write to one block"
            written |= there
            assert (batch.position_ids[begin:end] == places).all()
            self.ids[blocks, places % self.block_size] = batch.input_ids[begin:end]
            self.positions[blocks, places % self.block_size] = places
            tables.append((begin, end, past, table))
        for begin, end, past, table in tables:
            total = past + end - begin
            assert (self.positions[table].ravel()[:total] == np.arange(total)).all(), "a block holds another place's tokens"
            history = self.ids[table].ravel()[:total]
            for token in range(begin, end):
                histories[token] = history[: past + token - begin + 1]
        assert batch.max_context_len == longest
        rows = [next_logits(histories[int(row)][-self.memory :]) for row in batch.rows]
        self.best_only.append(batch.best_only)
        return FakeResult(np.array(rows, np.float32).reshape(len(rows), VOCABULARY), batch.best_only)

    def forward_alone(self, history: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of what follows a history, without any blocks."""
        logits = next_logits(history)
        return logits - np.log(np.exp(logits).sum())

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        destinations = [destination for _, destination in pairs]
        assert len(set(destinations)) == len(destinations)
        assert not set(destinations) & {source for source, _ in pairs}
        for source, destination in pairs:
            self.ids[destination] = self.ids[source]
            self.positions[destination] = self.positions[source]
            self.copies += 1


class LetterStream:
    def push(self, token: int) -> str:
        return "" if token == EOS else LETTERS[token]

    def flush(self) -> str:
        return ""


class LetterTokenizer:
    """One character a token."""

    vocab_size = VOCABULARY
    bos_ids: tuple[int, ...] = ()
    eos_ids = frozenset({EOS})

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(LETTERS[token] for token in tokens)

    def token_bytes(self, token: int) -> bytes:
        return LETTERS[token].encode()

    def stream(self) -> LetterStream:
        return LetterStream()
