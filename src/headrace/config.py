"""The configuration: frozen sections, passed in; nothing else reads the environment.

Every field's name is unique over all sections, so that outside it is one flat name: TOML `drain_timeout = 30`,
environment `HEADRACE_DRAIN_TIMEOUT=30`, and, where the command line has it, `--drain-timeout 30`.
`headrace.cli.sources` reads the sources and says where each value came from.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from headrace.claims import parse_rate


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServerSection(Section):
    """Where and how HTTP is served."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to bind")
    port: int = Field(8000, ge=0, le=65535, description="Port to bind; 0 takes a free one (environment also: API_PORT)")
    max_workers: int = Field(1, ge=1, le=64, description="API processes; all share one engine (environment also: MAX_WORKERS)")
    max_batch: int = Field(64, ge=1, le=4096, description="Most items in one /chat/batch")
    max_body_mib: float = Field(8.0, gt=0, le=1024, description="Largest request body, in MiB; larger ones get 413")
    request_timeout: float = Field(600.0, gt=0, description="Seconds a request may take from receipt to its last token")
    drain_timeout: float = Field(30.0, ge=0, description="Seconds that running requests get to finish at SIGTERM or Ctrl-C")
    slow_client_timeout: float = Field(
        30.0, gt=0, le=86_400, description="Seconds after which a client that reads nothing of its answer is cut off"
    )
    keepalive_interval: float = Field(15.0, gt=0, description="Seconds between SSE comments while a stream waits")
    cors_origins: tuple[str, ...] = Field((), description="Origins that browsers may call from; * for any")
    docs: bool = Field(True, description="Serve /docs and /openapi.json")

    @field_validator("cors_origins")
    @classmethod
    def _origins_can_match(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is not an origin such as https://example.org (no path, no slash at the end)")
        return origins


class AccessSection(Section):
    """Who may call."""

    api_keys: tuple[SecretStr, ...] = Field((), description="Bearer tokens; each is a tenant (HEADRACE_API_KEYS, comma-separated)")
    auth: Literal["open", "keys"] | None = Field(
        None, description="keys: every route needs one, but for health and docs; default is open on loopback, and keys beyond it"
    )
    insecure_no_auth: bool = Field(False, description="Allow an address beyond loopback without keys")
    trusted_proxies: tuple[str, ...] = Field((), description="Addresses or networks whose X-Forwarded-For is believed")

    key_cache_ttl: float = Field(900.0, ge=0, description="Seconds that known keys keep working while the database is away")

    @field_validator("api_keys")
    @classmethod
    def _keys_fit_a_header(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(keys, 1):
            if not re.fullmatch(r"[\x21-\x7e]+", key.get_secret_value()):
                raise ValueError(f"key {number} is empty or has characters other than printable ASCII, so no client could send it")
        return keys

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            try:
                ip_network(network, strict=False)
            except ValueError as error:
                raise ValueError(f"{network!r} is not an address or a network such as 10.0.0.0/8") from error
        return networks


class StoreSection(Section):
    """Where keys, bills and other lasting state are kept."""

    data_dir: Path = Field(Path("~/.local/share/headrace"), description="Private folder for the database and the keys' pepper")
    database_url: str | None = Field(
        None, min_length=1, description="sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME; default is headrace.db in data_dir"
    )


class Price(Section):
    """What a model's tokens cost, per million of them."""

    input: Decimal = Field(Decimal(0), ge=0, le=10**9, max_digits=18, decimal_places=6, description="Prompt tokens")
    output: Decimal = Field(Decimal(0), ge=0, le=10**9, max_digits=18, decimal_places=6, description="Completion tokens")
    cached: Decimal | None = Field(
        None, ge=0, le=10**9, max_digits=18, decimal_places=6, description="Prompt tokens from the prefix cache; default is as input"
    )


class LedgerSection(Section):
    """The bill: a row for every request."""

    ledger: Literal["on", "off"] = Field("on", description="Keep a row of usage for every request; off: nothing is billed")
    prices: dict[str, Price] = Field(
        {}, description="[prices.MODEL] with input, output and cached: money per million tokens (a JSON object in the environment)"
    )
    currency: str = Field("USD", min_length=1, max_length=8, description="Currency of the prices")

    @field_validator("prices", mode="before")
    @classmethod
    def _prices_may_be_json(cls, prices: object) -> object:
        return json.loads(prices) if isinstance(prices, str) else prices


class TlsSection(Section):
    """HTTPS. Off unless tls_cert is set."""

    tls_cert: Path | None = Field(None, description="PEM file with the server's certificate and its chain; read again when it changes")
    tls_key: Path | None = Field(None, description="PEM file with the certificate's key, unencrypted; default is in tls_cert")
    tls_client_ca: Path | None = Field(None, description="PEM file with CAs; clients then need a certificate from one of them")


class LimitSection(Section):
    """What callers may use. Keys and tenants have their own limits."""

    anonymous_limit: str | None = Field(
        None,
        description="Requests of an address without a key, such as 10/minute, or none; default is none on loopback, 10/minute beyond",
    )
    limits_url: str = Field(
        "memory://", description="Where limits are counted: memory:// (this server), redis://HOST:6379/0 (shared by servers)"
    )

    @field_validator("anonymous_limit")
    @classmethod
    def _is_a_rate(cls, limit: str | None) -> str | None:
        if limit is None or limit.strip().lower() == "none":
            return None if limit is None else "none"
        parse_rate(limit)
        return limit

    @field_validator("limits_url")
    @classmethod
    def _is_a_place(cls, url: str) -> str:
        if not re.match(r"memory://$|rediss?://|unix://", url):
            raise ValueError(f"{url!r} is not a place for limits; there is memory:// and redis://HOST:PORT/NUMBER")
        return url


_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""Other words for types."""


class ModelSection(Section):
    """What is served."""

    model: str = Field(
        "smollm2-135m-instruct",
        description="Catalog name, file, folder, hf:OWNER/NAME, ms:OWNER/NAME, an OpenAI-style URL, or echo (environment also: MODEL_PATH)",
    )
    name: str | None = Field(None, min_length=1, max_length=128, description="Name the model is served under, besides its own")
    context: int | None = Field(None, ge=16, description="Most tokens of prompt and completion together; default is the model's own")
    weights: Literal["auto", "int4", "int8", "full"] = Field("auto", description="Precision when a Transformers folder is converted")
    engine: Literal["auto", "openvino", "transformers", "vllm"] = Field(
        "auto", description="What runs the model; auto chooses by its format, the hardware and what is installed (docs/engines.md)"
    )
    quantize: Literal["int8", "int4", "nf4"] | None = Field(
        None, description="Quantize weights while the transformers engine loads them; nf4 on CUDA only"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type that the transformers engine computes in, or vllm; auto is what the device multiplies best"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$",
        description="Where the transformers engine runs: auto, cpu, cuda, cuda:N or mps; vllm takes auto, or what it was built for",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that a model ships; never settable by a request")
    cache_dir: Path = Field(
        Path("~/.cache/headrace"), description="Folder for models and converted files (environment also: HEADRACE_CACHE)"
    )
    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="Hub for OWNER/NAME without a prefix")
    offline: bool = Field(False, description="Never touch the network for models")
    remote_api_key: SecretStr | None = Field(None, description="Bearer token for a remote engine's URL")
    remote_model: str | None = Field(None, description="Model to ask a remote engine for; default is the first it lists")

    @field_validator("dtype", mode="before")
    @classmethod
    def _types_have_short_names(cls, dtype: object) -> object:
        return _TYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype


class GoldenPrompt(Section):
    """A prompt by whose greedy answer versions of a model are compared."""

    prompt: str = Field(min_length=1, description="What is asked")
    expect: str | None = Field(None, min_length=1, description="What the answer should be like; default is the version before")


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class ModelEntry(Section):
    """[models.NAME], or [models."NAME@VERSION"]: one version of one of several models. docs/models.md."""

    model: str | None = Field(None, min_length=1, description="As for MODEL; a version without one has that of [models.NAME]")
    version: str = Field("1", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="What [models.NAME] itself is called behind the @")
    revision: str | None = Field(None, min_length=1, description="Branch, tag or commit of a repository on a hub")
    engine: Literal["auto", "openvino", "transformers", "vllm"] = Field("auto", description="As for the default model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="As for the default model")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$", description="As for the default model")
    quantize: Literal["int8", "int4", "nf4"] | None = Field(None, description="As for the default model")
    weights: Literal["auto", "int4", "int8", "full"] = Field("auto", description="As for the default model")
    remote_api_key: SecretStr | None = Field(None, description="Bearer token for a remote engine's URL")
    remote_model: str | None = Field(None, description="Model to ask a remote engine for")
    replicas: int = Field(1, ge=1, le=64, description="Workers that serve it side by side, each with its own copy in memory")
    context: int | None = Field(None, ge=16, description="Most tokens of prompt and completion together")
    aliases: tuple[str, ...] = Field((), description="Further names")
    kv_cache_gib: float | None = Field(None, gt=0, description="Memory for keys and values of each replica")
    memory_gib: float | None = Field(None, gt=0, description="Memory that each replica is taken to need; default is worked out")
    pinned: bool = Field(False, description="Loaded at the start, and never unloaded to make room")
    keep_alive: float | None = Field(None, ge=0, description='Seconds without requests after which it is unloaded, or such as "5m"')
    temperature: float | None = Field(None, ge=0, le=2, description="Where a request doesn't say")
    top_p: float | None = Field(None, ge=0, le=1, description="Where a request doesn't say")
    top_k: int | None = Field(None, ge=0, description="Where a request doesn't say")
    min_p: float | None = Field(None, ge=0, le=1, description="Where a request doesn't say")
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Where a request doesn't say")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Where a request doesn't say")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Where a request doesn't say")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="Where a request doesn't say")
    golden: tuple[GoldenPrompt, ...] = Field(
        tuple(GoldenPrompt(prompt=text) for text in ("What is the capital of France?", "Count from one to ten.", "Say hello to a friend.")),
        description="Prompts whose answers a new version must not change too much; strings, or tables of prompt and expect",
    )
    golden_similarity: float = Field(0.3, ge=0, le=1, description="Least likeness of the answers, on the mean over the golden prompts")

    @model_validator(mode="before")
    @classmethod
    def _other_words(cls, given: object) -> object:
        """`source` and `quantization` are what others call `model` and `quantize`."""
        if not isinstance(given, dict):
            return given
        known = dict(given)
        for word, ours in (("source", "model"), ("quantization", "quantize")):
            if word in known and ours not in known:
                known[ours] = known.pop(word)
        return known

    @field_validator("dtype", mode="before")
    @classmethod
    def _types_have_short_names(cls, dtype: object) -> object:
        return _TYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype

    @field_validator("keep_alive", mode="before")
    @classmethod
    def _may_have_a_unit(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", value)
        if found is None:
            raise ValueError('it is seconds, or a number with s, m, h or d, such as "5m"')
        return float(found[1]) * _UNITS[found[2] or "s"]

    @model_validator(mode="after")
    def _stays_or_leaves(self) -> ModelEntry:
        if self.pinned and self.keep_alive is not None:
            raise ValueError("keep_alive says when it is unloaded, and pinned that it never is; set one of them")
        return self

    @field_validator("golden", mode="before")
    @classmethod
    def _may_be_plain_texts(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return tuple({"prompt": each} if isinstance(each, str) else each for each in value)
        return value


class AliasEntry(Section):
    """[aliases.NAME]: a further name, for one model or for several."""

    to: str | None = Field(None, min_length=1, description="NAME or NAME@VERSION that it stands for")
    split: dict[str, float] = Field({}, description="Or several of them, each with its weight; a caller stays with one")
    shadow: str | None = Field(
        None, min_length=1, description="A model that gets a copy of each request; its answer is compared and dropped"
    )
    shadow_share: float = Field(1.0, gt=0, le=1, description="Share of the requests that are copied")

    @field_validator("split")
    @classmethod
    def _weights_are_weights(cls, split: dict[str, float]) -> dict[str, float]:
        if split and (min(split.values()) < 0 or not sum(split.values())):
            raise ValueError("weights are 0 or more, and not all 0")
        return split

    @model_validator(mode="after")
    def _leads_somewhere(self) -> AliasEntry:
        if (self.to is None) == (not self.split):
            raise ValueError("it needs one of `to` and `split`")
        return self


class FleetSection(Section):
    """Several models, and several versions of them. docs/models.md and docs/upgrades.md."""

    models: dict[str, ModelEntry] = Field(
        {},
        description='[models.NAME] and [models."NAME@VERSION"]: further models, loaded when asked for (a JSON object in the environment)',
    )
    aliases: dict[str, AliasEntry] = Field(
        {}, description="[aliases.NAME] with to, split or shadow: names for models (a JSON object in the environment)"
    )
    memory_budget_gib: float | None = Field(
        None, gt=0, description="Memory that all loaded models may take, where there are [models]; default is 90 % of what is free"
    )
    upgrade_watch: float = Field(30.0, ge=0, le=86_400, description="Seconds that a promoted version is watched, and may be rolled back")
    upgrade_min_requests: int = Field(5, ge=1, description="Requests of both versions before they are compared")
    upgrade_error_share: float = Field(
        0.05, ge=0, lt=1, description="Share by which more requests may fail than before, or the version is rolled back"
    )
    upgrade_slowdown: float = Field(2.0, ge=1, description="How many times as long first tokens may take, or the version is rolled back")

    @field_validator("models", "aliases", mode="before")
    @classmethod
    def _may_be_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value


class EngineSection(Section):
    """The scheduler and its memory."""

    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of the engine; default is one a core")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of each GPU's memory that weights, keys and values and computing may take together"
    )
    tensor_parallel: int = Field(1, ge=1, le=1024, description="GPUs that share each layer of a model; needs the vllm engine")
    pipeline_parallel: int = Field(
        1, ge=1, le=1024, description="Groups of GPUs that have a model's layers in turn, each tensor_parallel large; needs the vllm engine"
    )
    kv_cache_gib: float | None = Field(None, gt=0, description="Memory for keys and values; default from free memory")
    max_sequences: int = Field(64, ge=1, le=1024, description="Most sequences in one batch")
    step_tokens: int = Field(512, ge=16, le=65536, description="Most tokens in one step; longer prompts go in chunks")
    prefix_cache: bool = Field(True, description="Reuse keys and values of prompts that begin alike, within a tenant")
    deterministic: bool = Field(
        False,
        description="Text depends on nothing but its request: no batching of products, no prefix cache (OpenVINO; see docs/resilience.md)",
    )
    prompt_lookup: bool = Field(True, description="Guess tokens from what was said before, and verify several in one step")


class LogSection(Section):
    """What the server says of itself."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="(environment also: LOG_LEVEL)")
    log_file: Path | None = Field(None, description="Also log to this file, rotated")
    log_file_mib: float = Field(64.0, gt=0, description="Size at which the log file is rotated, in MiB")
    log_file_keep: int = Field(5, ge=0, le=1000, description="Rotated log files kept")


class FilterSection(Section):
    """What is refused, masked or blocked in prompts and answers. All off unless set."""

    filter_input_max_chars: int | None = Field(None, ge=1, description="Most characters in a prompt, all messages together")
    filter_control_characters: Literal["keep", "strip", "refuse"] = Field(
        "keep", description="Control characters in prompts, but for tab and line ends"
    )
    deny_input: tuple[str, ...] = Field((), description="Words that refuse a prompt; anywhere in it, whatever their case")
    deny_input_patterns: tuple[str, ...] = Field((), description="RE2 patterns that refuse a prompt")
    deny_output: tuple[str, ...] = Field((), description="Words that never leave in an answer; anywhere in it, whatever their case")
    deny_output_patterns: tuple[str, ...] = Field((), description="RE2 patterns of a limited length that never leave in an answer")
    deny_action: Literal["mask", "block"] = Field("mask", description="At denied text in an answer: mask it, or end the answer before it")
    pii_input: Literal["off", "mask", "refuse"] = Field("off", description="Personal data in prompts")
    pii_output: Literal["off", "mask", "block"] = Field("off", description="Personal data in answers")
    pii_kinds: tuple[str, ...] = Field(
        ("email", "phone", "card", "cn_id", "secret"), description="Personal data that is looked for: email, phone, card, cn_id, secret"
    )
    filter_mask: str = Field("***", min_length=1, max_length=64, description="What stands in for masked text")
    report_filters: bool = Field(False, description="Tell callers what was filtered: X-Headrace-Filter, and a comment in streams")


class CacheSection(Section):
    """Answers kept, to be given again to the same request."""

    response_cache: Literal["on", "off"] = Field(
        "on", description="Keep answers to deterministic requests (temperature 0, or a seed), and to those that ask for it"
    )
    cache_url: str | None = Field(
        None, min_length=1, description="Second level: sqlite:///FILE, redis://HOST or memory:// (none); default is cache.db in data_dir"
    )
    cache_ttl: float = Field(3600.0, gt=0, le=31_536_000, description="Seconds that an answer is kept")
    cache_memory_mib: float = Field(64.0, gt=0, description="Memory of each API process for answers, in MiB")
    cache_disk_mib: float = Field(1024.0, gt=0, description="Answers kept on disk, in MiB; Redis has its own limit (maxmemory)")
    cache_encryption_key: SecretStr | None = Field(None, min_length=16, description="Encrypts answers in the second level")
    cached_price: float = Field(0.0, ge=0, le=1, description="Fraction of its tokens that an answer from the cache is billed with")


class ResilienceSection(Section):
    """What is done when an engine fails, or has too much to do."""

    stall_timeout: float = Field(
        5.0,
        ge=1,
        le=3600,
        description="Seconds without progress, or three times a step's expected length, after which a worker is replaced",
    )
    standby: bool = Field(False, description="Keep a second engine loaded that takes over at once; takes the model's memory again")
    give_up_after: float = Field(
        60.0, gt=0, le=86_400, description="Seconds of failing to bring an engine back after which its requests end with an error"
    )
    breaker: Literal["on", "off"] = Field("on", description="Leave an engine alone for a while when it fails too often")
    breaker_window: float = Field(30.0, gt=0, le=3600, description="Seconds over which an engine's failures are counted")
    breaker_failure_share: float = Field(0.5, gt=0, le=1, description="Share of failed and slow requests at which the breaker opens")
    breaker_min_calls: int = Field(10, ge=1, le=100_000, description="Requests within the window before their share says anything")
    breaker_slow_ttft: float = Field(
        120.0, ge=0, description="Seconds to the first token, without the engine's queue, from which a request counts as failed; 0 is never"
    )
    breaker_open_seconds: float = Field(10.0, gt=0, le=3600, description="Seconds that an open breaker waits before it lets probes through")
    breaker_probes: int = Field(3, ge=1, le=1000, description="Requests that try the engine then; all have to succeed")
    retry_budget: float = Field(
        0.1, ge=0, le=1, description="Share of an engine's requests that may be asked again before their first token; 0 is none"
    )
    retry_reserve: int = Field(3, ge=0, le=1000, description="Retries on top of that share, in each API process")
    retry_attempts: int = Field(2, ge=1, le=10, description="Most retries of one request")
    fallbacks: dict[str, tuple[str, ...]] = Field(
        {},
        description='Who answers where a model can\'t: a table of NAME = ["MODEL", "https://HOST/v1", "cache", "canned: TEXT"]',
    )
    fallback_cache_age: float = Field(
        86_400.0, ge=0, le=31_536_000, description="Seconds that answers are kept beyond cache_ttl, where a fallback is `cache`"
    )
    quarantine_seconds: float = Field(
        3600.0, gt=0, le=31_536_000, description="Seconds for which a request that killed the engine, running alone, is refused"
    )
    degrade_queue: int | None = Field(None, ge=1, description="Waiting sequences of a model over which its answers are degraded")
    degrade_max_tokens: int | None = Field(None, ge=1, description="Most tokens of a degraded answer")
    degrade_model: str | None = Field(None, min_length=1, description="Model, named as for MODEL, that gives degraded answers")

    @field_validator("fallbacks", mode="before")
    @classmethod
    def _table_from_a_variable(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError('in a variable it is JSON, such as {"NAME": ["MODEL", "canned: TEXT"]}') from None

    @field_validator("fallbacks")
    @classmethod
    def _chains_lead_somewhere(cls, chains: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, chain in chains.items():
            for entry in chain:
                if not entry.strip() or not entry.removeprefix("canned:").strip():
                    raise ValueError(f"{name} has an empty fallback")
            final = [place for place, entry in enumerate(chain, 1) if entry.startswith("canned:")]
            if final and final[0] < len(chain):
                raise ValueError(f"{name}: a canned answer never fails, so nothing can come after it")
        return chains


class OverloadSection(Section):
    """Who waits for a model that has much to do, and who is refused. docs/overload.md."""

    max_queue_requests: int = Field(1024, ge=1, le=1_000_000, description="Most requests that wait for a model's first token")
    max_queue_tokens: int = Field(2_000_000, ge=1, description="Most prompt tokens of the requests that wait for a model")
    max_queue_wait: float = Field(
        120.0, gt=0, le=86_400, description="Longest wait for a first token, in seconds; who would wait longer gets 503"
    )
    ttft_target: float = Field(
        2.0, ge=0, le=3600, description="Seconds to the first token that admission keeps to under overload; 0 is no target"
    )


class TraceSection(Section):
    """OpenTelemetry traces. Off unless otel_endpoint is set; needs headrace[otel]."""

    otel_endpoint: str | None = Field(
        None,
        description="Where traces go, by OTLP over HTTP, such as http://localhost:4318 (environment also: OTEL_EXPORTER_OTLP_ENDPOINT)",
    )
    otel_service_name: str = Field(
        "headrace", min_length=1, description="The service's name in traces (environment also: OTEL_SERVICE_NAME)"
    )

    @field_validator("otel_endpoint")
    @classmethod
    def _is_a_collector(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
            raise ValueError(f"{url!r} is not a URL such as http://localhost:4318 (OTLP over HTTP, not gRPC)")
        return url


class AlertSection(Section):
    """When the server calls for somebody. Alerts are in the log, and sent to a webhook if there is one."""

    alert_webhook: SecretStr | None = Field(None, description="URL that is called (POST, JSON) when an alert fires and when it clears")
    alert_webhook_secret: SecretStr | None = Field(
        None, min_length=16, description="Signs what is sent: X-Headrace-Signature is the body's HMAC-SHA256 with it"
    )
    alert_window: float = Field(300.0, gt=0, le=86_400, description="Seconds over which failed and long queued requests are counted")
    alert_min_requests: int = Field(20, ge=1, description="Requests within the window before shares of them say anything")
    alert_error_share: float = Field(0.05, ge=0, lt=1, description="Share of a model's requests that fail, above which it is an alert")
    alert_queue_seconds: float = Field(
        30.0, gt=0, description="Seconds in an engine's queue; it is an alert if more than a tenth of the requests wait longer"
    )
    alert_engine_down_seconds: float = Field(30.0, gt=0, description="Seconds that an engine is down before it is an alert")
    alert_budget_share: float = Field(0.8, gt=0, le=1, description="Spent share of a key's or a tenant's budget of tokens that is an alert")

    @field_validator("alert_webhook")
    @classmethod
    def _is_a_web_address(cls, url: SecretStr | None) -> SecretStr | None:
        # What is wrong with it is said without showing it: it may hold a token.
        pattern = r"https?://(?:[^\s/?#@]*@)?(?:[^\s/?#@:\[\]]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?(?:[/?#]\S*)?"
        if url is not None and not re.fullmatch(pattern, url.get_secret_value()):
            raise ValueError("it is not a URL such as https://example.org/alerts (http or https)")
        return url


class Config(Section):
    """All sections. `Config()` is the default configuration;"""

    server: ServerSection = ServerSection()
    access: AccessSection = AccessSection()
    store: StoreSection = StoreSection()
    ledger: LedgerSection = LedgerSection()
    tls: TlsSection = TlsSection()
    limits: LimitSection = LimitSection()
    model: ModelSection = ModelSection()
    fleet: FleetSection = FleetSection()
    engine: EngineSection = EngineSection()
    filters: FilterSection = FilterSection()
    cache: CacheSection = CacheSection()
    resilience: ResilienceSection = ResilienceSection()
    overload: OverloadSection = OverloadSection()
    trace: TraceSection = TraceSection()
    alerts: AlertSection = AlertSection()
    log: LogSection = LogSection()


def sections() -> dict[str, type[Section]]:
    """Section classes by their attribute on `Config`."""
    return {name: info.annotation for name, info in Config.model_fields.items() if isinstance(info.annotation, type)}


def fields() -> dict[str, str]:
    """Every flat name, with the section that holds it."""
    return {field: section for section, cls in sections().items() for field in cls.model_fields}
