"""Ten times too much load: goodput against its peak, the time to refuse, and the recovery afterwards.

Open loop: requests come whether or not earlier ones are done, at moments of their own, as those of many users do (a Poisson process, of
which the number of requests is fixed). Goodput is the completed requests a second with a first token within 2 s and 200 ms at most for each
further one. The rate of the peak is looked for by raising it; then that rate and the overload take turns, for the best of several tries is
the luckiest, too. Every request is of one tenant.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from bench.figures import Figure, Findings, Side, quantile, ratio
from bench.rounds import interleave
from bench.servers import Server, ServerFailed, headrace
from bench.sides.prompts import texts
from headrace.cli.load import LoadFailed, Sample, run_load, run_quickly

TTFT = 2.0
TPOT = 0.2
RECOVERED = 0.9
"""Of the peak's share of good requests: from when on the load after the overload counts as served again."""
SERVED = 0.8
"""Of a rate's requests: with fewer good ones it is beyond the peak."""
LATEST = 60.0
"""Seconds that requests get to end."""


def run(
    *,
    model: str = "smollm2-135m-instruct",
    factor: float = 10.0,
    words: int = 60,
    max_tokens: int = 32,
    first_rate: float = 8.0,
    step: float = 1.25,
    seconds: int = 16,
    overload_seconds: int = 16,
    rounds: int = 3,
) -> Findings:
    """`first_rate`: requests a second at which the search for the peak begins; each is `step` times the one before, for `seconds`: as long
    as the overload, or a queue that only fills up would count as goodput."""
    refusals: list[float] = []
    recoveries: list[float] = []
    shares: list[float] = []
    with headrace(model) as server:
        _ask(server, 2.0, 2.0, words, max_tokens, 0)  # warms up, and is thrown away
        rate = _peak(server, first_rate, step, seconds, words, max_tokens, 1000)

        def peak(number: int) -> float:
            return sum(map(is_good, _ask(server, rate, seconds, words, max_tokens, 10_000 + number))) / seconds

        def overloaded(number: int) -> float:
            loaded, after = _overload(server, rate, factor, overload_seconds, 13, words, max_tokens, 100_000 * (number + 1))
            refused = [sample.seconds * 1000 for sample in loaded if sample.error is not None and sample.error.startswith("http ")]
            shares.append(len(refused) / len(loaded))
            if refused:
                refusals.append(quantile(refused, 0.99))
            recoveries.append(recovery(after))
            return sum(map(is_good, loaded)) / overload_seconds

        goodput = interleave({"overloaded": overloaded, "peak": peak}, rounds, warm_up=False)
    return Findings(
        f"Overload: {factor:g} times the {rate:.1f} req/s of the peak",
        (
            ratio(
                f"goodput at {factor:g} × ÷ peak goodput",
                Side("overloaded", tuple(goodput["overloaded"]), "req/s"),
                Side("peak", tuple(goodput["peak"]), "req/s"),
                bound=0.95,
            ),
            Figure("time to refuse, p99", quantile(refusals or [0.0], 0.5), 20.0, "at most", "ms"),
            Figure("recovery after the overload", quantile(recoveries, 0.5), 5.0, "at most", "s"),
        ),
        (f"Of the overload's requests {quantile(shares, 0.5):.0%} were refused.",),
    )


def is_good(sample: Sample) -> bool:
    """Whether a request counts for the goodput."""
    return sample.error is None and sample.ttft is not None and sample.ttft <= TTFT and (sample.tpot is None or sample.tpot <= TPOT)


def recovery(after: Sequence[Sample]) -> float:
    """Seconds after which all but one in ten of the requests that came were good; those of the first second are 0 s."""
    begun = min(sample.started for sample in after)
    ordered = sorted(after, key=lambda sample: sample.started)
    good = [is_good(sample) for sample in ordered]
    for place, sample in enumerate(ordered):
        if sum(good[place:]) >= RECOVERED * len(good[place:]):
            return sample.started - begun
    return ordered[-1].started - begun


def _peak(server: Server, rate: float, step: float, seconds: float, words: int, max_tokens: int, number: int) -> float:
    """The rate with the highest goodput."""
    best, most = rate, 0.0
    while True:
        # A rate is too high if it is twice: a stall of the machine is no peak.
        for again in (0, 500):
            samples = _ask(server, rate, seconds, words, max_tokens, number + again)
            good = sum(map(is_good, samples)) / seconds
            if good >= SERVED * rate:
                break
        print(f"  {rate:.1f} req/s: {good:.2f} good", flush=True)
        if good > most:
            best, most = rate, good
        if good < SERVED * rate:
            return best
        rate, number = rate * step, number + 1


def _overload(
    server: Server, rate: float, factor: float, seconds: float, after: float, words: int, max_tokens: int, number: int
) -> tuple[list[Sample], list[Sample]]:
    """The overload, and the load of the peak that comes without a pause after it."""
    count = int(rate * factor * seconds)
    calm = int(rate * after)
    at = _arrivals(count, seconds, number) + [seconds + each for each in _arrivals(calm, after, number + 1)]
    samples = _run(server, at, words, max_tokens, number)
    return samples[:count], samples[count:]


def _ask(server: Server, rate: float, seconds: float, words: int, max_tokens: int, number: int) -> list[Sample]:
    return _run(server, _arrivals(int(rate * seconds), seconds, number), words, max_tokens, number)


def _arrivals(count: int, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process that has so many in that time."""
    moments = random.Random(seed)
    return sorted(moments.uniform(0, seconds) for _ in range(count))


def _run(server: Server, at: Sequence[float], words: int, max_tokens: int, number: int) -> list[Sample]:
    try:
        result = run_quickly(
            run_load(server.url, arrivals=at, max_tokens=max_tokens, prompts=texts(len(at), number, words), ignore_eos=True, timeout=LATEST)
        )
    except LoadFailed as error:
        server.check()
        raise ServerFailed(f"{server.name}: {error}") from error
    return result.samples
