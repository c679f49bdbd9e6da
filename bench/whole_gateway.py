"""The whole gateway, switched on for a benchmark: a key with every limit, the ledger, the cache, the filters, the breaker."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from bench.servers import Server, ServerFailed, clean_environment, headrace

OFF = {"HEADRACE_LEDGER": "off", "HEADRACE_RESPONSE_CACHE": "off", "HEADRACE_BREAKER": "off"}
"""Nothing of it, as far as it can be switched off: counting for /metrics and the line in the log can't."""

ON = {
    "HEADRACE_AUTH": "keys",
    "HEADRACE_LEDGER": "on",
    "HEADRACE_RESPONSE_CACHE": "on",
    "HEADRACE_BREAKER": "on",
    "HEADRACE_DENY_INPUT": "forbidden fruit,trade secret",
    "HEADRACE_PII_INPUT": "mask",
    "HEADRACE_DENY_OUTPUT": "forbidden fruit,trade secret",
    "HEADRACE_PII_OUTPUT": "mask",
}
_LIMITS = ("--rpm", "100000000", "--tpm", "10000000000", "--concurrency", "10000", "--budget-tokens", "1000000000000")
"""Never reached; what they cost is that they are counted."""


@contextmanager
def gateway_on(*arguments: str) -> Iterator[tuple[Server, str]]:
    """A server with all of it, and the key that it wants. Raises `ServerFailed`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        environment = ON | {"HEADRACE_DATA_DIR": folder}
        key = _key(environment)
        with headrace(*arguments, environment=environment) as server:
            yield server, key


@contextmanager
def gateway_off(*arguments: str) -> Iterator[Server]:
    """A server with none of it. Raises `ServerFailed`."""
    with headrace(*arguments, environment=OFF) as server:
        yield server


def _key(environment: dict[str, str]) -> str:
    command = [
        sys.executable,
        "-m",
        "headrace",
        "keys",
        "create",
        "--name",
        "bench",
        "--scopes",
        "inference,usage,admin",
        *_LIMITS,
        "--json",
    ]
    made = subprocess.run(command, env=clean_environment() | environment, capture_output=True, text=True, check=False)
    if made.returncode:
        raise ServerFailed(f"headrace keys create: {made.stderr}")
    return str(json.loads(made.stdout)["secret"])
