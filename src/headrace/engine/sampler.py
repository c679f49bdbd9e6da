"""Draws tokens, exactly from the distribution asked for, mostly without looking at more than the likeliest few.

A row's logits change in this order: repetition, frequency and presence penalties, logit_bias, and while fewer than
min_tokens are generated the end tokens are masked; then temperature, min_p, top_k, top_p, the draw. From temperature
on it is the order of vLLM's V1 sampler, and min_p is relative to the likeliest token there too. Each filter works on
what the one before has left, and the rest counts as the whole again.

Rows without penalties, bias or mask are drawn as matrices from the runner's candidates (see `candidates`), the others
one by one from all logits. Either way one uniform number makes one token by inverting the cumulative distribution, in
the same order of tokens, so that the way never shows in the result.

Logprobs are the model's own, before any of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.engine.candidates import UNDECIDED, Filters, draw, invert, likeliest
from headrace.engine.random_numbers import stream_key, uniform
from headrace.errors import InvalidParameter, RequestFailed
from headrace.ports import ForwardResult
from headrace.types import Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""
BAN = -100.0
"""A logit_bias at or below this bans its token."""
_UNSOUND = "The model's output is not a distribution (it has NaN or infinite logits)."


class Picked(NamedTuple):
    """A token, its natural-log probability, and the likeliest tokens with theirs, likeliest first, where asked for."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class SequenceSampler:
    """How the tokens of one choice are drawn, and what of its past that depends on.

    `generated` are tokens that exist already, where a completion is taken up again. `eos_ids` end a completion; with
    `min_tokens` they and `stop_token_ids` can't be drawn before (with `ignore_eos` only the latter). Without a seed in
    `sampling` it is `fallback_seed`, which the caller draws.

    Raises `InvalidParameter` for a `logit_bias` outside the vocabulary.
    """

    __slots__ = (
        "_bias",
        "_changed",
        "_counts",
        "_ends",
        "_generated",
        "_key",
        "_sampling",
        "_seen",
        "_telling",
        "filters",
        "greedy",
        "logprobs",
        "vocab_size",
    )

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        vocab_size: int,
        choice: int,
        eos_ids: frozenset[int],
        fallback_seed: int,
        generated: Sequence[int] = (),
    ) -> None:
        self._sampling = sampling
        self._key = stream_key(fallback_seed if sampling.seed is None else sampling.seed, choice)
        self._generated = len(generated)
        self.greedy = sampling.temperature < GREEDY_BELOW
        self.filters = Filters(sampling.temperature, sampling.min_p, sampling.top_k or vocab_size, sampling.top_p)
        self.logprobs = sampling.logprobs or 0
        self._telling = sampling.logprobs is not None
        self.vocab_size = vocab_size
        self._bias = _bias(sampling.logit_bias, vocab_size)
        ends = set(sampling.stop_token_ids) if sampling.ignore_eos else eos_ids | set(sampling.stop_token_ids)
        self._ends = np.array([token for token in ends if 0 <= token < vocab_size], np.int64)
        self._counts: NDArray[np.int32] | None = None
        self._seen: NDArray[np.bool_] | None = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = np.bincount(np.array(generated, np.int64), minlength=vocab_size).astype(np.int32)
        if sampling.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[np.array([*prompt, *generated], np.int64)] = True
        self._changed = self._bias is not None or self._counts is not None or self._seen is not None

    @property
    def needs_full(self) -> bool:
        """Whether the next token surely needs all logits of its row."""
        return self._changed or self._generated < self._sampling.min_tokens

    @property
    def takes_best(self) -> bool:
        """Whether the next token is the row's likeliest, and nobody asks how likely."""
        return self.greedy and not self._telling and not self.needs_full

    @property
    def generated(self) -> int:
        """Tokens accepted so far."""
        return self._generated

    def accept(self, token: int) -> None:
        """Take note of a token that was drawn."""
        self._generated += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def uniform(self, ahead: int = 0) -> float:
        """The random number of the next token, or of the one `ahead` tokens after it."""
        return uniform(self._key, self._generated + ahead)

    def change(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Penalties, bias and mask, on a row's logits. Raises `InvalidParameter` where no token is left."""
        changed = logits.astype(np.float64)
        sampling = self._sampling
        if self._seen is not None:
            # As in CTRL (Keskar et al., 2019) and everywhere since: a positive logit is divided, a negative multiplied.
            seen = self._seen.nonzero()[0]
            values = changed[seen]
            changed[seen] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
        if self._counts is not None:
            drawn = self._counts.nonzero()[0]
            changed[drawn] -= sampling.frequency_penalty * self._counts[drawn] + sampling.presence_penalty
        if self._bias is not None:
            tokens, biases = self._bias
            changed[tokens] += biases
        if self._generated < sampling.min_tokens:
            changed[self._ends] = -np.inf
        if not np.isfinite(changed.max()):
            raise InvalidParameter("logit_bias and min_tokens leave no token that could be drawn.", param="logit_bias")
        return changed


def _bias(biases: dict[int, float], vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    if not biases:
        return None
    tokens = np.array(list(biases), np.int64)
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise InvalidParameter(f"logit_bias names token {outside[0]}; this model's are 0 to {vocab_size - 1}.", param="logit_bias")
    values = np.array(list(biases.values()), np.float64)
    values[values <= BAN] = -np.inf
    return tokens, values


def sample_rows(
    result: ForwardResult, samplers: Sequence[SequenceSampler], rows: Sequence[int] | None = None, ahead: Sequence[int] | None = None
) -> list[Picked | Exception]:
    """A token for each sampler, from its entry in `rows` (in order where that is None), or the error that it met.

    A sampler that occurs several times draws its next tokens: `ahead` says how many tokens after the next each is. They stand
    only as far as the rows' guesses come true; a sampler that `needs_full` can't look ahead.

    An error of one row never touches the others: `RequestFailed` where its distribution isn't one, `InvalidParameter`
    where its own filters leave nothing.
    """
    where = list(range(len(samplers))) if rows is None else list(rows)
    if not where:
        return []
    ids, logits, logsumexp = result.top_ids, result.top_logits, result.logsumexp
    if rows is not None or len(ids) != len(where):
        ids, logits, logsumexp = ids[where], logits[where], logsumexp[where]
    sound = np.isfinite(logsumexp).tolist()
    plain = [not sampler.needs_full for sampler in samplers]
    places = [0] * len(where)
    drawn = [number for number, sampler in enumerate(samplers) if plain[number] and not sampler.greedy]
    if drawn:
        some = [samplers[number] for number in drawn]
        filters = [sampler.filters for sampler in some]
        uniforms = [samplers[number].uniform(ahead[number] if ahead else 0) for number in drawn]
        for number, place in zip(drawn, draw(logits[drawn], logsumexp[drawn], filters, uniforms, some[0].vocab_size), strict=True):
            places[number] = place
        tokens = ids[np.arange(len(where)), places].tolist()
        logprobs = (logits[np.arange(len(where)), places] - logsumexp).tolist()
    else:
        tokens, logprobs = ids[:, 0].tolist(), (logits[:, 0] - logsumexp).tolist()
    picks: list[Picked | Exception] = []
    for number, sampler in enumerate(samplers):
        row, wanted = where[number], sampler.logprobs
        try:
            if not sound[number]:
                picks.append(RequestFailed(_UNSOUND))
            elif plain[number] and places[number] != UNDECIDED:
                picks.append(Picked(tokens[number], logprobs[number], _top(result, row, wanted) if wanted else ()))
            else:
                token, logprob = _pick_full(result, row, sampler, ahead[number] if ahead else 0)
                picks.append(Picked(token, logprob, _top(result, row, wanted)))
        except Exception as error:  # noqa: BLE001  an error belongs to one request; the scheduler tells it
            picks.append(error)
    return picks


def take_best(result: ForwardResult, rows: Sequence[int] | None = None) -> list[Picked | Exception]:
    """The likeliest token of each of `rows`, or of all, for samplers that want nothing else: their logprobs are left at 0. A
    `RequestFailed` stands for a row that is no distribution."""
    ids, logits = result.top_ids[:, 0], result.top_logits[:, 0]
    if rows is not None:
        ids, logits = ids[rows], logits[rows]
    sound = np.isfinite(logits)
    if sound.all():
        return [Picked(token, 0.0, ()) for token in ids.tolist()]
    return [Picked(token, 0.0, ()) if fine else RequestFailed(_UNSOUND) for token, fine in zip(ids.tolist(), sound.tolist(), strict=True)]


def score_rows(result: ForwardResult, rows: Sequence[int], targets: Sequence[int], k: int) -> list[Picked]:
    """Of each row the logprob of a token that is given, and the `k` likeliest. Raises `RequestFailed` on NaN logits."""
    where = list(rows)
    if not where:
        return []
    ids, logits, logsumexp = result.top_ids[where], result.top_logits[where], result.logsumexp[where]
    if not np.isfinite(logsumexp).all():
        raise RequestFailed(_UNSOUND)
    found = ids == np.array(targets, np.int64)[:, None]
    among, place = found.any(axis=1).tolist(), found.argmax(axis=1)
    logprobs = (logits[np.arange(len(where)), place] - logsumexp).tolist()
    scored = []
    for number, (row, target) in enumerate(zip(where, targets, strict=True)):
        logprob = logprobs[number] if among[number] else float(result.logits(row)[target] - logsumexp[number])
        scored.append(Picked(target, logprob, _top(result, row, k)))
    return scored


def _pick_full(result: ForwardResult, row: int, sampler: SequenceSampler, ahead: int) -> tuple[int, float]:
    raw = result.logits(row)
    if sampler.needs_full:
        values: NDArray[np.floating] = sampler.change(raw)
        # As many as the runner's candidates, so that neutral changes give the same token as none.
        head = likeliest(values, 1 if sampler.greedy else result.top_ids.shape[1])
    else:
        values, head = raw, result.top_ids[row]
    token = int(head[0]) if sampler.greedy else invert(values, head, sampler.filters, sampler.uniform(ahead))
    return token, float(raw[token] - result.logsumexp[row])


def _top(result: ForwardResult, row: int, k: int) -> tuple[tuple[int, float], ...]:
    if not k:
        return ()
    ids, logits = result.top_ids[row, :k], result.top_logits[row, :k]
    if len(ids) < k:
        everything = result.logits(row)
        ids = likeliest(everything, min(k, len(everything)))
        logits = everything[ids]
    return tuple(zip(ids.tolist(), (logits - result.logsumexp[row]).tolist(), strict=True))
