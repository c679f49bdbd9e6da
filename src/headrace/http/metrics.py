"""`GET /metrics`: counters of requests and tokens, and the engines' gauges, taken when asked.

With several API processes each counts into files in the folder that `PROMETHEUS_MULTIPROC_DIR` names (the supervisor sets it before
prometheus_client is imported), and whichever is asked adds them up. The engines' gauges need no adding: all processes share the engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, get_args, runtime_checkable

from starlette.requests import Request

from headrace import __version__
from headrace.errors import HeadraceError, NotAdmitted, QueueShareFull, RateLimited
from headrace.http.answers import Answer, Whole
from headrace.http.exchange import Exchange
from headrace.http.failures import Failure, code_of, model_name
from headrace.http.gathered import Gathered
from headrace.http.serving import Control
from headrace.policies.cache import HEADER as CACHE_HEADER
from headrace.policies.degrade import HEADER as DEGRADED_HEADER
from headrace.policies.route import HEADER as FALLBACK_HEADER
from headrace.policies.token_lease import BUDGET_ENDED
from headrace.policies.token_lease import NOTE as LIMIT_NOTE
from headrace.quarantine import Quarantine
from headrace.served import ServedModel, ServedModels
from headrace.types import CircuitState, DeathCause

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

_REQUEST_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)

_CIRCUITS: dict[CircuitState, float] = {"closed": 0.0, "half_open": 1.0, "open": 2.0}


@runtime_checkable
class Refreshes(Protocol):
    """An engine client whose statistics are elsewhere."""

    async def refresh(self) -> object:
        """Fetch what `stats()` then says."""
        ...


@runtime_checkable
class Quarantines(Protocol):
    """An engine client that refuses requests which kill the engine."""

    quarantined: Quarantine


class _ModelMeters:
    """One model's children, resolved once: looking labels up costs more than counting."""

    __slots__ = ("cached", "completion", "first_token", "per_token", "prompt", "queue")

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.prompt = metrics.prompt_tokens.labels(model)
        self.completion = metrics.completion_tokens.labels(model)
        self.cached = metrics.cached_tokens.labels(model)
        self.first_token = metrics.first_token.labels(model)
        self.per_token = metrics.per_token.labels(model)
        self.queue = metrics.queue.labels(model)


class Metrics:
    def __init__(self, models: ServedModels, control: Control) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._models = models
        self._control = control
        self._shared = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        self.registry = CollectorRegistry()
        into = self.registry
        self.requests = Counter("headrace_requests", "Answered requests", ["route", "method", "status", "model"], registry=into)
        self.seconds = Histogram(
            "headrace_request_seconds", "From receipt to the last byte", ["route"], buckets=_REQUEST_BUCKETS, registry=into
        )
        # In files, gauges of processes that died are left out of the sum.
        self.in_flight = Gauge("headrace_requests_in_flight", "Requests being answered", multiprocess_mode="livesum", registry=into)
        self.prompt_tokens = Counter("headrace_prompt_tokens", "Tokens of prompts", ["model"], registry=into)
        self.completion_tokens = Counter("headrace_completion_tokens", "Tokens generated", ["model"], registry=into)
        self.cached_tokens = Counter("headrace_cached_tokens", "Tokens of prompts found in the prefix cache", ["model"], registry=into)
        self.fallbacks = Counter("headrace_fallbacks", "Answers that a fallback gave, by why", ["model", "reason"], registry=into)
        self.not_admitted = Counter(
            "headrace_admission_refusals",
            "Requests that a full or slow queue refused or put out, by the error's code",
            ["model", "reason", "priority"],
            registry=into,
        )
        self.degraded = Counter("headrace_degraded", "Answers cut or made by a smaller model, for a long queue", ["model"], registry=into)
        self.errors = Counter(
            "headrace_errors", "Requests, and items of batches, that ended in an error, by its code", ["code", "model"], registry=into
        )
        self.refused = Counter(
            "headrace_limit_refusals", "Requests refused for a limit, by what ran out and whose it is", ["kind", "subject"], registry=into
        )
        self.retries = Counter("headrace_retries", "Requests asked again before their first token", ["model"], registry=into)
        self.budget_ends = Counter("headrace_budget_ends", "Answers cut short where a token budget ended", ["model"], registry=into)
        self.ledger_away = Gauge(
            "headrace_ledger_away",
            "1 while usage goes to the journal because the database is away",
            multiprocess_mode="livemax",
            registry=into,
        )
        self.filtered = Counter("headrace_filter_actions", "Matches that filters acted on", ["stage", "kind", "action"], registry=into)
        self.first_token = Histogram(
            "headrace_time_to_first_token_seconds",
            "From receipt to the first token",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=into,
        )
        self.per_token = Histogram(
            "headrace_time_per_output_token_seconds",
            "Mean time of a request's tokens after its first",
            ["model"],
            buckets=_TOKEN_BUCKETS,
            registry=into,
        )
        self.queue = Histogram("headrace_queue_seconds", "Time in the engine's queue", ["model"], buckets=_QUEUE_BUCKETS, registry=into)
        self.kept = Counter(
            "headrace_response_cache",
            "Requests by what the response cache had: the level, shared (under way for another request), miss or off",
            ["model", "result"],
            registry=into,
        )
        self._gathered = Gathered()
        self._under_way = 0
        self._kept = lru_cache(maxsize=256)(self.kept.labels)
        self._request = lru_cache(maxsize=1024)(self.requests.labels)
        self._seconds = lru_cache(maxsize=256)(self.seconds.labels)
        # Under overload most answers are refusals.
        self._errors = lru_cache(maxsize=256)(self.errors.labels)
        self._not_admitted = lru_cache(maxsize=256)(self.not_admitted.labels)
        self._refused = lru_cache(maxsize=256)(self.refused.labels)
        self._model = lru_cache(maxsize=256)(lambda model: _ModelMeters(self, model))

    def opened(self) -> None:
        self._under_way += 1
        self._gathered.count(self.in_flight)

    def closed(self, exchange: Exchange, status: int, model: str, now: float, failed: Sequence[Failure] = ()) -> None:
        """Count a request that is over. `model` is a name of ours or empty, never what a client made up."""
        gathered = self._gathered
        self._under_way -= 1
        gathered.count(self.in_flight, -1)
        # Methods that no route has would let a client make up label values.
        method = exchange.method if exchange.method in ("GET", "POST", "HEAD", "OPTIONS", "PATCH", "DELETE") else "other"
        gathered.count(self._request(exchange.route, method, str(status), model))
        gathered.observe(self._seconds(exchange.route), now - exchange.started_at)
        for failing, error in failed:
            gathered.count(self._errors(code_of(error), model_name(self._models, failing)))
            if isinstance(error, RateLimited) and error.limit is not None:
                gathered.count(self._refused(*error.limit))
        for call in exchange.calls:
            for name in call.retried:
                self.retries.labels(self._models.find(name).public_name).inc()
            for decision in call.filtered:
                self.filtered.labels(*decision).inc()
            if call.served_model is None:
                continue
            meters = self._model(self._models.find(call.served_model).public_name)
            outcome = call.outcome
            if isinstance(outcome.error, NotAdmitted | QueueShareFull):
                name = self._models.find(call.served_model).public_name
                gathered.count(self._not_admitted(name, outcome.error.code, call.priority))
            kept = outcome.cache_level or ("shared" if outcome.served_from == "shared" else call.headers.get(CACHE_HEADER, "off"))
            gathered.count(self._kept(self._models.find(call.served_model).public_name, kept))
            reason = call.headers.get(FALLBACK_HEADER)
            if reason is not None and outcome.error is None:
                self.fallbacks.labels(self._models.find(call.model).public_name, reason).inc()
            if call.notes.get(LIMIT_NOTE) == BUDGET_ENDED:
                self.budget_ends.labels(self._models.find(call.served_model).public_name).inc()
            if DEGRADED_HEADER in call.headers:
                self.degraded.labels(self._models.find(call.model).public_name).inc()
            # Of a shared generation each of its calls counts its own part.
            prompt = outcome.prompt_tokens if outcome.own_prompt_tokens is None else outcome.own_prompt_tokens
            completion = outcome.completion_tokens if outcome.own_completion_tokens is None else outcome.own_completion_tokens
            if prompt and (outcome.report is not None or completion or outcome.first_token_at is not None):
                # What was refused, by a limit or a queue, no engine has read.
                gathered.count(meters.prompt, prompt)
            if completion:
                gathered.count(meters.completion, completion)
            if outcome.served_from != "engine":
                continue
            if outcome.cached_tokens:
                gathered.count(meters.cached, outcome.cached_tokens)
            if outcome.report is not None:
                gathered.observe(meters.queue, outcome.report.queue_ms / 1000)
            if outcome.first_token_at is not None:
                gathered.observe(meters.first_token, outcome.first_token_at - call.started_at)
                later = outcome.completion_tokens / call.sampling.n - 1
                if later > 0 and outcome.error is None:
                    gathered.observe(meters.per_token, (now - outcome.first_token_at) / later)
        if not self._under_way:
            # A process that has nothing to do, or leaves, owes no counts.
            gathered.flush()

    async def scrape(self, request: Request) -> Answer:
        """Everything counted, in Prometheus' text form."""
        from prometheus_client import CONTENT_TYPE_LATEST

        for served in self._models:
            if isinstance(served.engine, Refreshes):
                await served.engine.refresh()
        processes: Mapping[str, Any] = {}
        with contextlib.suppress(HeadraceError):  # the rest is still worth having
            processes = await self._control.ps()
        self._gathered.flush()
        tasks = len(asyncio.all_tasks())
        # Writing it out takes a few milliseconds of Python, which a thread interrupts where the event loop could not.
        text = await asyncio.to_thread(self._write, processes, tasks)
        return Whole(text, content_type=CONTENT_TYPE_LATEST.encode())

    def _write(self, processes: Mapping[str, Any], tasks: int) -> bytes:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        engines = CollectorRegistry()
        engines.register(_Engines(self._models))
        engines.register(_Processes(processes, tasks))
        if not self._shared:
            return bytes(generate_latest(self.registry)) + bytes(generate_latest(engines))
        added_up = CollectorRegistry()
        added_up.register(_OfAllProcesses(MultiProcessCollector(None), self.registry))
        return bytes(generate_latest(added_up)) + bytes(generate_latest(engines))


class _OfAllProcesses:
    """What the processes have counted, added up. The files know only what was counted once; the rest is there, too, without samples."""

    def __init__(self, counted: Any, known: CollectorRegistry) -> None:
        self._counted = counted
        self._known = known

    def collect(self) -> Iterator[Metric]:
        there = set()
        for metric in self._counted.collect():
            there.add(metric.name)
            yield metric
        yield from (metric for metric in self._known.collect() if metric.name not in there)


class _Engines:
    """Collects what the engines say of themselves."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        gauges: dict[str, tuple[str, Any]] = {
            "headrace_sequences_running": ("Sequences in the batch", lambda s: s.running),
            "headrace_sequences_waiting": ("Sequences queued", lambda s: s.waiting),
            "headrace_predicted_wait_seconds": ("To the first token of a short request, if it came now", lambda s: s.predicted_wait),
            "headrace_kv_blocks_used": ("KV blocks in use", lambda s: s.blocks_used),
            "headrace_kv_blocks_total": ("KV blocks there are", lambda s: s.blocks_total),
            "headrace_gpu_memory_used_bytes": ("In use on the GPUs that hold the model, by whomever", lambda s: s.gpu_used),
            "headrace_gpu_memory_total_bytes": ("Of the GPUs that hold the model", lambda s: s.gpu_total),
        }
        counters: dict[str, tuple[str, Any]] = {
            "headrace_engine_steps": ("Steps of the engine's loop", lambda s: s.steps),
            "headrace_engine_step_seconds": ("Time spent in steps", lambda s: s.step_seconds),
            "headrace_engine_prompt_tokens": ("Prompt tokens that the engine took in", lambda s: s.prompt_tokens),
            "headrace_engine_completion_tokens": ("Tokens that the engine generated", lambda s: s.completion_tokens),
            "headrace_prefix_cache_hit_tokens": ("Prompt tokens found in the prefix cache", lambda s: s.cached_tokens),
            "headrace_resumed_requests": ("Requests that went on after their engine's death", lambda s: s.resumed),
            "headrace_preemptions": ("Sequences set back because KV blocks ran out", lambda s: s.preemptions),
            "headrace_guessed_tokens": ("Tokens computed on the guess that they come next", lambda s: s.guessed_tokens),
            "headrace_guessed_right_tokens": ("Guessed tokens that came true, each a step saved", lambda s: s.right_tokens),
        }
        stats = [(served.public_name, served.engine.stats()) for served in self._models]
        for name, (text, read) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model, snapshot in stats:
                gauge.add_metric([model], read(snapshot))
            yield gauge
        for name, (text, read) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["model"])
            for model, snapshot in stats:
                counter.add_metric([model], read(snapshot))
            yield counter
        ready = GaugeMetricFamily("headrace_ready", "1 when the model's engine is ready", labels=["model"])
        restarts = CounterMetricFamily("headrace_engine_restarts", "Times the model's engine was started again", labels=["model"])
        for served in self._models:
            ready.add_metric([served.public_name], float(served.status.state == "ready"))
            restarts.add_metric([served.public_name], served.status.restarts)
        deaths = CounterMetricFamily("headrace_engine_deaths", "Times the model's engine was replaced, by why", labels=["model", "reason"])
        for served in self._models:
            for cause in get_args(DeathCause):
                deaths.add_metric([served.public_name, cause], served.status.deaths.get(cause, 0))
        circuits = GaugeMetricFamily(
            "headrace_breaker_state", "Of the model's circuit breaker: 0 closed, 1 half-open, 2 open", labels=["model"]
        )
        for served in self._models:
            circuits.add_metric([served.public_name], _CIRCUITS[served.circuit])
        convicted = CounterMetricFamily("headrace_quarantined_requests", "Requests found to kill the model's engine", labels=["model"])
        refused = GaugeMetricFamily("headrace_quarantine_size", "Requests that are refused because they kill the engine", labels=["model"])
        for served in self._models:
            quarantined = served.engine.quarantined if isinstance(served.engine, Quarantines) else Quarantine()
            convicted.add_metric([served.public_name], quarantined.convictions)
            refused.add_metric([served.public_name], len(quarantined))
        yield convicted
        yield refused
        yield ready
        yield restarts
        yield deaths
        yield circuits


class _Processes:
    """Collects what the supervisor says of its processes, as `headrace ps` shows it."""

    def __init__(self, listing: Mapping[str, Any], tasks: int) -> None:
        self._listing = listing
        self._tasks = tasks

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        build = GaugeMetricFamily("headrace_build_info", "1, for this version", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        tasks = GaugeMetricFamily("headrace_tasks", "Tasks of the event loop of the API process that answers")
        tasks.add_metric([], self._tasks)
        yield tasks
        memory = GaugeMetricFamily("headrace_resident_memory_bytes", "Resident memory, all processes of a kind", labels=["process"])
        restarts = CounterMetricFamily("headrace_process_restarts", "Times that processes were started again", labels=["process"])
        kinds = (("api", self._listing.get("api", ())), ("engine", self._listing.get("workers", ())))
        for process, lines in kinds:
            memory.add_metric([process], 2**20 * sum(line.get("memory_mib") or 0 for line in lines))
            restarts.add_metric([process], sum(line.get("restarts", 0) for line in lines))
        yield from self._several()
        memory.add_metric(["supervisor"], 2**20 * (self._listing.get("supervisor", {}).get("memory_mib") or 0))
        yield memory
        yield restarts

    def _several(self) -> Iterator[Metric]:
        """Where several models come and go."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        budget = GaugeMetricFamily("headrace_models_budget_bytes", "Memory that all models may take", labels=["pool"])
        held = GaugeMetricFamily("headrace_models_held_bytes", "Memory promised to models that are loaded", labels=["pool"])
        for pool, memory in self._listing.get("memory", {}).items():
            budget.add_metric([pool], memory["budget"])
            held.add_metric([pool], memory["held"])
        labels = ["model", "shadow"]
        compared = CounterMetricFamily("headrace_shadow_compared", "Answers compared with those of a shadowing model", labels=labels)
        likeness = CounterMetricFamily("headrace_shadow_likeness", "Likeness of these answers, 0 to 1 each, added up", labels=labels)
        failed = CounterMetricFamily("headrace_shadow_failed", "Copies of requests that a shadowing model failed to answer", labels=labels)
        for each in self._listing.get("shadows", ()):
            names = [each["model"], each["shadow"]]
            compared.add_metric(names, each["compared"])
            likeness.add_metric(names, each["compared"] * (each["likeness"] or 0.0))
            failed.add_metric(names, each["failed"])
        yield from (family for family in (budget, held, compared, likeness, failed) if family.samples)


def model_of(models: ServedModels, exchange: Exchange) -> ServedModel | None:
    """The model that answered, where there was one."""
    for call in exchange.calls:
        if call.served_model is not None:
            return models.find(call.served_model)
    return None
