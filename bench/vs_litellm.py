"""The whole gateway ÷ LiteLLM's proxy with keys: CPU time of a streamed request of 64 tokens, 16 users.

LiteLLM stands before an echo server of ours, and passes on what that streams; Headrace has its echo engine in a worker of its own. Each
side is charged for what is in front of its engine: LiteLLM's process, and Headrace's API process and supervisor, with a key that has
limits, the ledger, the cache (which misses), filters and the breaker. LiteLLM knows its master key only: further keys, and what it
writes about them, would need a PostgreSQL beside it, and cost it more. A third side, shown for comparison, is Headrace as a proxy of
that same echo server (`remote`), charged for all of its processes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import msgspec

from bench.figures import Findings, Side, ratio
from bench.load_side import complete
from bench.rounds import interleave
from bench.servers import BUILD, Server, ServerFailed, clean_environment, cpu_seconds, free_port, headrace, running
from bench.sides.prompts import texts
from bench.whole_gateway import gateway_on
from headrace.cli.load import run_load, run_quickly

BOUND = 1 / 30
MASTER_KEY = "sk-bench-0123456789"
MODEL = "echo"


def run(*, users: int = 16, requests: int = 128, max_tokens: int = 64, rounds: int = 3, pace: float = 0.0) -> Findings:
    """`pace`: seconds of an engine step; 0 is an engine that answers at once, on both sides. One that takes its time has each token wake
    somebody: with 0.01 both cost more."""
    engine = f"echo?pace={pace}"
    numbers = count(1)
    with (
        headrace(engine) as upstream,
        gateway_on(engine) as (own, key),
        gateway_on(f"{upstream.url}/v1") as (relay, relay_key),
        litellm(upstream) as proxy,
    ):

        def cost(server: Server, key: str, model: str | None, *, engine: bool) -> float:
            """Milliseconds a request."""
            pids = [server.process.pid, *server.descendants()]
            charged = pids if engine else [pid for pid in pids if not _is_worker(pid)]
            before = sum(map(cpu_seconds, charged))
            prompts = texts(requests, next(numbers))
            result = run_quickly(
                run_load(
                    server.url,
                    users=users,
                    requests=requests,
                    max_tokens=max_tokens,
                    prompts=prompts,
                    key=key,
                    model=model,
                    cached=True,
                )
            )
            complete(server, result, max_tokens)
            return (sum(map(cpu_seconds, charged)) - before) / requests * 1e3

        values = interleave(
            {
                "headrace": lambda _: cost(own, key, None, engine=False),
                "relay": lambda _: cost(relay, relay_key, None, engine=True),
                "litellm": lambda _: cost(proxy, MASTER_KEY, MODEL, engine=True),
            },
            rounds,
        )
    theirs = Side("LiteLLM", tuple(values["litellm"]), "ms")
    return Findings(
        f"The whole gateway ÷ LiteLLM's proxy, {users} users",
        (
            ratio(
                f"CPU of a streamed request of {max_tokens} tokens", Side("headrace", tuple(values["headrace"]), "ms"), theirs,
                bound=BOUND, sense="at most",
            ),
            ratio("the same, all processes, as a proxy of the same server", Side("headrace", tuple(values["relay"]), "ms"), theirs),
        ),
        ("LiteLLM with its master key and one worker process.",),
    )  # fmt: skip


def _is_worker(pid: int) -> bool:
    return b"headrace.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


@contextmanager
def litellm(upstream: Server, timeout: float = 180.0) -> Iterator[Server]:
    """LiteLLM's proxy before `upstream`, from bench/peers/install_litellm.sh. Raises `ServerFailed`."""
    program = BUILD / "litellm"
    if not program.exists():
        raise ServerFailed("There is no LiteLLM: run bench/peers/install_litellm.sh.")
    served = {"model": f"openai/{MODEL}", "api_base": f"{upstream.url}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": MODEL, "litellm_params": served}],
        "general_settings": {"master_key": MASTER_KEY},
        "litellm_settings": {"telemetry": False},
    }
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        # JSON is YAML.
        Path(folder, "config.yaml").write_bytes(msgspec.json.encode(config))
        command = [str(program), "--config", f"{folder}/config.yaml", "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        # Prices from the package, not from the net.
        environment = clean_environment() | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "HOME": os.environ["HOME"]}
        with running("LiteLLM", command, port, "/health/liveliness", environment, Path(folder), timeout) as server:
            yield server
