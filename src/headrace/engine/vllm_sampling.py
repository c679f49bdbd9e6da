"""A request in vLLM's words: for each choice its prompt, its sampling parameters, and its place in the line."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from headrace.engine.sampler import Picked
from headrace.types import GenerateRequest

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.sampling_params import SamplingParams

_SEEDS = 2**63 - 1
"""A seed of -1 means none to vLLM; torch's generators take 64 bits."""


def sampling_params(request: GenerateRequest, choice: int, *, limit: int, eos_ids: frozenset[int]) -> SamplingParams:
    """How one choice is drawn, from where it is. `limit`: most tokens of its completion, those included that it has already.

    Choices are requests of their own to vLLM, with seeds one apart. Stop strings stay with us, and so does the end of text: vLLM stops at
    the ids that it is given, and knows no others.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    asked, said = request.sampling, generated(request, choice)
    scores = asked.prompt_logprobs if choice == 0 and not (request.resume is not None and request.resume.scored) else None
    most = max(1, limit - len(said))  # where nothing is to be generated one token is, and dropped: vLLM can't but generate
    ends = set(asked.stop_token_ids) if asked.ignore_eos else eos_ids.union(asked.stop_token_ids)
    return SamplingParams(
        n=1,
        max_tokens=most,
        min_tokens=min(max(0, asked.min_tokens - len(said)), most),
        temperature=asked.temperature,
        top_p=max(asked.top_p, 1e-9),  # it refuses 0, which leaves the likeliest token
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=None if asked.seed is None else (asked.seed + choice + (len(said) << 32)) & _SEEDS,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=_bias(request, said) or None,
        stop_token_ids=sorted(ends),
        ignore_eos=True,
        logprobs=asked.logprobs,
        prompt_logprobs=scores,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )


def generated(request: GenerateRequest, choice: int) -> tuple[int, ...]:
    """What a choice has already, made by an engine before this one. To vLLM it is part of the prompt."""
    return () if request.resume is None else request.resume.generated[choice]


def _bias(request: GenerateRequest, said: tuple[int, ...]) -> dict[int, float]:
    """The request's, and what its penalties are for tokens that vLLM takes for the prompt's, which these penalties spare.

    The frequency penalty goes on exactly so. The presence penalty counts twice for a token that was said before and is said again.
    """
    asked = request.sampling
    bias = dict(asked.logit_bias)
    if asked.presence_penalty or asked.frequency_penalty:
        for token, count in Counter(said).items():
            bias[token] = bias.get(token, 0.0) - asked.presence_penalty - count * asked.frequency_penalty
    return bias


def picked(token: int, position: dict[int, Logprob] | None) -> Picked:
    """A token with what vLLM says of its position: its own logprob, and those of the likeliest."""
    if position is None:
        return Picked(token, 0.0, ())
    likeliest = sorted(position.items(), key=lambda entry: (-entry[1].logprob, entry[1].rank or 0))
    return Picked(token, position[token].logprob, tuple((each, its.logprob) for each, its in likeliest))


class Places:
    """Places in vLLM's line: the higher rank first, and within a rank tenants share by the tokens they ask for.

    Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): a request is tagged with the virtual time at which its tenant's last one
    would be done, or with that of the request that was last served, if that is later. vLLM serves the smallest number first.
    """

    _RANK = 1 << 40

    def __init__(self) -> None:
        self._now = 0
        self._done: dict[int, int] = {}

    def take(self, request: GenerateRequest) -> int:
        """The priority of a new request, and its tenant's next one is behind it."""
        tag = max(self._now, self._done.get(request.tenant, 0))
        sampling = request.sampling
        self._done[request.tenant] = tag + len(request.prompt) + sampling.n * min(sampling.max_tokens, 1024)
        return min(tag, self._RANK - 1) - request.rank * self._RANK

    def served(self, priority: int) -> None:
        """A request has got its first token: virtual time is at least its tag."""
        self._now = max(self._now, priority % self._RANK)

    def rest(self) -> None:
        """Nothing runs: time begins anew, for everybody alike."""
        self._now = 0
        self._done.clear()
