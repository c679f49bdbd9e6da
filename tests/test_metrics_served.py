"""`/metrics` of a server with two API processes: whichever is asked adds up what both have counted."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from running_server import RunningServer, eventually


def value(text: str, name: str) -> float:
    """The sum over all labels."""
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith((name + " ", name + "{")))


@pytest.mark.slow
def test_both_processes_are_added_up(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo", environment={"MAX_WORKERS": "2", "HEADRACE_ANONYMOUS_LIMIT": "60/hour"}) as server:
        # Dashboards and rules ask for names before anything of the kind has happened.
        begun = httpx.get(f"{server.url}/metrics", trust_env=False).text
        for name in ("errors", "limit_refusals", "filter_actions", "retries", "fallbacks", "response_cache", "completion_tokens"):
            assert begun.count(f"# TYPE headrace_{name}_total counter") == 1
        assert begun.count("# TYPE headrace_time_to_first_token_seconds histogram") == 1
        sent = refused = 0

        def both_served() -> bool:
            nonlocal sent, refused
            with httpx.Client(base_url=server.url, trust_env=False) as fresh:
                status = fresh.post("/chat", json={"prompt": "hello", "max_length": 4}).status_code
            sent += 1
            refused += status == 429
            return len({line["pid"] for line in server.events("request") if line["route"] == "/chat"}) == 2

        eventually(both_served, what="requests in both processes")
        while not refused:
            both_served()
        eventually(lambda: len([line for line in server.events("request") if line["route"] == "/chat"]) == sent, what="all log lines")
        for _ in range(8):
            with httpx.Client(base_url=server.url, trust_env=False) as fresh:
                text = fresh.get("/metrics").text
            chats = [line for line in text.splitlines() if 'route="/chat"' in line and line.startswith("headrace_requests_total")]
            assert sum(float(line.rpartition(" ")[2]) for line in chats) == sent
            assert value(text, "headrace_limit_refusals_total") == value(text, "headrace_errors_total") == refused
            assert value(text, "headrace_time_to_first_token_seconds_count") == sent - refused
            assert value(text, "headrace_completion_tokens_total") == value(text, "headrace_engine_completion_tokens_total")
            assert value(text, "headrace_requests_in_flight") == 1
            assert 'headrace_process_restarts_total{process="api"}' in text
            assert value(text, "headrace_resident_memory_bytes") > 3e7
        assert 'headrace_limit_refusals_total{kind="requests",subject="address"}' in text
        assert text.count("# TYPE headrace_requests_total counter") == 1
