"""What a picked token means for its choice: text, logprobs, and whether the choice ends with it."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.sampler import Picked, SequenceSampler
from headrace.engine.stops import StopStrings
from headrace.ports import Tokenizer
from headrace.types import Delta, FinishReason, Sampling, TokenLogprob


class TokenWords:
    """Bytes and text of single tokens, looked up once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        known = self._known.get(token)
        if known is None:
            raw = self._tokenizer.token_bytes(token)
            known = self._known[token] = (raw.decode("utf-8", "replace"), raw)
        return known

    def logprob(self, picked: Picked, most: int) -> TokenLogprob:
        """A picked or scored token with its `most` likeliest alternatives."""
        text, raw = self[picked.token]
        top = tuple((token, logprob, *self[token]) for token, logprob in picked.top[:most])
        return TokenLogprob(picked.token, picked.logprob, text, raw, top)


class CompletionText:
    """The text of one choice as it grows, and its end conditions.

    End conditions, in this order: the end of text (unless ignored) or a stop token, which are counted but show no
    text; a stop string; `limit` tokens of prompt and completion. Before `min_tokens` tokens only the last applies.
    """

    __slots__ = ("_choice", "_ends", "_eos", "_limit", "_min_tokens", "_most", "_stops", "_stream", "_words")

    def __init__(self, sampling: Sampling, tokenizer: Tokenizer, words: TokenWords, *, choice: int, limit: int) -> None:
        self._choice = choice
        self._eos = frozenset() if sampling.ignore_eos else tokenizer.eos_ids
        self._ends = self._eos.union(sampling.stop_token_ids)
        self._limit = limit
        """Tokens of completion at which the choice ends with `length`."""
        self._min_tokens = sampling.min_tokens
        self._most = sampling.logprobs
        self._stops = StopStrings(sampling.stop) if sampling.stop else None
        self._stream = tokenizer.stream()
        self._words = words

    def replay(self, tokens: Sequence[int]) -> None:
        """Take in the completion's first tokens, which another engine has drawn and said. A sampler has them already.

        What they show was shown; what is held back after them is what was held back there.
        """
        for count, token in enumerate(tokens, 1):
            text = self._stream.push(token)
            if self._stops is not None and text and count >= self._min_tokens:
                self._stops.push(text)

    def read(self, picked: Picked, index: int) -> Delta:
        """Take in the token at `index` of the completion. The delta says if the choice ended with it."""
        token = picked.token
        logprobs = () if self._most is None else (self._words.logprob(picked, self._most),)
        count = index + 1
        if token in self._ends and count > self._min_tokens:
            text, matched = self._last("")
            if matched is not None:
                return Delta(self._choice, index, (token,), text, "stop", matched, logprobs)
            return Delta(self._choice, index, (token,), text, "stop", None if token in self._eos else token, logprobs)
        text = self._stream.push(token)
        matched = None
        if self._stops is not None and text and count >= self._min_tokens:
            text, matched = self._stops.push(text)
        finish: FinishReason | None = None
        if matched is not None:
            finish = "stop"
        elif count >= self._limit:
            text, matched = self._last(text)
            finish = "length" if matched is None else "stop"
        return Delta(self._choice, index, (token,), text, finish, matched, logprobs)

    def _last(self, text: str) -> tuple[str, str | None]:
        """All text that is left, after `text`; incomplete bytes may still complete a stop string."""
        rest = self._stream.flush()
        if self._stops is None:
            return text + rest, None
        shown, matched = self._stops.push(rest)
        if matched is not None:
            return text + shown, matched
        return text + shown + self._stops.flush(), None


class Completion(CompletionText):
    """The same with its sampler, for an engine that draws tokens itself."""

    __slots__ = ("sampler",)

    def __init__(
        self,
        sampling: Sampling,
        sampler: SequenceSampler,
        tokenizer: Tokenizer,
        words: TokenWords,
        *,
        choice: int,
        limit: int,
    ) -> None:
        super().__init__(sampling, tokenizer, words, choice=choice, limit=limit)
        self.sampler = sampler

    def accept(self, picked: Picked, index: int) -> Delta:
        """Take in the token at `index` of the completion, for the tokens after it, too."""
        self.sampler.accept(picked.token)
        return self.read(picked, index)
