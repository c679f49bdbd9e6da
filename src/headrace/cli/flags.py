"""The configuration's flags, one table for every command that takes them.

The table stands by itself, without importing `headrace.config`, so that `headrace --version` and `--help` start at
once; a test holds the two together. Secrets have no flag: a command line is readable by every user of a machine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import typer


@dataclass(frozen=True, slots=True)
class Flag:
    field: str
    """The flat name in the configuration."""
    kind: type
    help: str
    metavar: str | None = None
    panel: str = "Options"
    one_way: bool = False
    """A switch that only turns on."""

    @property
    def name(self) -> str:
        return "--" + self.field.replace("_", "-")

    def option(self) -> Any:
        names = f"{self.name}/--no-{self.field.replace('_', '-')}" if self.kind is bool and not self.one_way else self.name
        return typer.Option(None, names, help=self.help, metavar=self.metavar, rich_help_panel=self.panel, show_default=False)


_MODEL, _SERVER, _ENGINE, _LOG = "Model", "Server", "Engine", "Log"

FLAGS: tuple[Flag, ...] = (
    Flag("name", str, "Name the model is served under, besides its own.", "ALIAS", _MODEL),
    Flag("context", int, "Most tokens of prompt and completion together.", "N", _MODEL),
    Flag("weights", str, "Precision when a Transformers folder is converted: auto, int4, int8 or full.", "PRECISION", _MODEL),
    Flag("engine", str, "What runs the model: auto, openvino, transformers or vllm.", "ENGINE", _MODEL),
    Flag("quantize", str, "Quantize weights as the transformers engine loads them: int8, int4 or nf4.", "PRECISION", _MODEL),
    Flag("dtype", str, "Type that the transformers engine computes in: auto, float32, bfloat16 or float16.", "TYPE", _MODEL),
    Flag("device", str, "Where the transformers engine runs: auto, cpu, cuda, cuda:N or mps.", "DEVICE", _MODEL),
    Flag("hub", str, "Hub for OWNER/NAME without a prefix: huggingface or modelscope.", "HUB", _MODEL),
    Flag("cache_dir", str, "Folder for models and converted files.", "FOLDER", _MODEL),
    Flag("offline", bool, "Never touch the network for models.", None, _MODEL),
    Flag("trust_remote_code", bool, "Run Python code that a model ships.", None, _MODEL, one_way=True),
    Flag("remote_model", str, "Model to ask a remote engine for.", "NAME", _MODEL),
    Flag("host", str, "Address to bind (127.0.0.1).", "ADDRESS", _SERVER),
    Flag("port", int, "Port to bind (8000); 0 takes a free one.", "PORT", _SERVER),
    Flag("max_workers", int, "API processes (1); all share one engine.", "N", _SERVER),
    Flag("auth", str, "open, or keys: every route needs one, but for health and docs.", "MODE", _SERVER),
    Flag("insecure_no_auth", bool, "Allow an address beyond loopback without keys.", None, _SERVER, one_way=True),
    Flag("key_cache_ttl", float, "Seconds that known keys go on while the database is away (900).", "SECONDS", _SERVER),
    Flag("max_batch", int, "Most items in one /chat/batch (64).", "N", _SERVER),
    Flag("max_body_mib", float, "Largest request body (8).", "MIB", _SERVER),
    Flag("request_timeout", float, "Seconds a request may take (600).", "SECONDS", _SERVER),
    Flag("drain_timeout", float, "Seconds that running requests get to finish at the end (30).", "SECONDS", _SERVER),
    Flag("keepalive_interval", float, "Seconds between SSE comments while a stream waits (15).", "SECONDS", _SERVER),
    Flag("slow_client_timeout", float, "Seconds in which a client must read something of its stream (30).", "SECONDS", _SERVER),
    Flag("cors_origins", str, "Origins that browsers may call from, comma-separated; * for any.", "ORIGINS", _SERVER),
    Flag("trusted_proxies", str, "Addresses or networks whose X-Forwarded-For is believed, comma-separated.", "NETWORKS", _SERVER),
    Flag("tls_cert", str, "PEM file with the server's certificate: serve HTTPS.", "FILE", _SERVER),
    Flag("tls_key", str, "PEM file with the certificate's key.", "FILE", _SERVER),
    Flag("tls_client_ca", str, "PEM file with CAs that clients' certificates have to be from.", "FILE", _SERVER),
    Flag("data_dir", str, "Private folder for keys, bills and other lasting state.", "FOLDER", _SERVER),
    Flag("docs", bool, "Serve /docs and /openapi.json (yes).", None, _SERVER),
    Flag("threads", int, "CPU threads of the engine; default is one a core.", "N", _ENGINE),
    Flag("gpu_memory_utilization", float, "Share of each GPU's memory that may be taken (0.9).", "SHARE", _ENGINE),
    Flag("tensor_parallel", int, "GPUs that share each layer (vllm).", "N", _ENGINE),
    Flag("pipeline_parallel", int, "Groups of GPUs that share the layers (vllm).", "N", _ENGINE),
    Flag("kv_cache_gib", float, "Memory for keys and values; default from free memory.", "GIB", _ENGINE),
    Flag("max_sequences", int, "Most sequences in one batch (64).", "N", _ENGINE),
    Flag("step_tokens", int, "Most tokens in one step (512); longer prompts go in chunks.", "N", _ENGINE),
    Flag("prefix_cache", bool, "Reuse keys and values of prompts that begin alike (yes).", None, _ENGINE),
    Flag("prompt_lookup", bool, "Guess tokens from what was said before, verify several in one step (yes).", None, _ENGINE),
    Flag("deterministic", bool, "The same text whatever else is in the batch; slower.", None, _ENGINE),
    Flag("log_level", str, "debug, info, warning or error.", "LEVEL", _LOG),
    Flag("log_file", str, "Also log to this file, rotated.", "FILE", _LOG),
    Flag("log_file_mib", float, "Size at which the log file is rotated (64).", "MIB", _LOG),
    Flag("log_file_keep", int, "Rotated log files kept (5).", "N", _LOG),
)


def takes_flags(*fields: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these fields (all without any), besides its own parameters.

    The command receives them as `flags`, flat names and values, None where a flag was not given; and `--config` as
    `config`. A `model` argument of the command's own is put among the flags.
    """
    chosen = [flag for flag in FLAGS if not fields or flag.field in fields]
    keyword = inspect.Parameter.KEYWORD_ONLY

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in ("flags", "config")]
        config = inspect.Parameter(
            "config",
            keyword,
            annotation=Path | None,
            default=typer.Option(
                None, "--config", help="TOML file; default is ./headrace.toml if there is one.", metavar="FILE", show_default=False
            ),
        )
        added = [inspect.Parameter(f.field, keyword, annotation=f.kind | None, default=f.option()) for f in chosen]

        @wraps(command)
        def run(**given: Any) -> None:
            flags: Mapping[str, Any] = {flag.field: given.pop(flag.field) for flag in chosen}
            if "model" in given:
                flags = {"model": given.pop("model"), **flags}
            command(flags=flags, config=given.pop("config"), **given)

        parameters = [*own, config, *added]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        return run

    return decorate
