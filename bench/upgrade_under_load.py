"""A new version of a model goes live while users ask it, and goes back again: how many requests fail, or break off."""

from __future__ import annotations

import json

import httpx

from bench.figures import Figure, Findings
from bench.several import Users, fleet, operator

TOKENS = 48


def run(*, model: str = "smollm2-135m-instruct", users: int = 8, turns: int = 3, watch: float = 2.0, answers: int = 16) -> Findings:
    """`turns`: times that the version is promoted and rolled back; `answers`: that users get between two of them."""
    toml = (
        f"log_level = 'error'\n[models.chat]\nmodel = '{model}'\nkv_cache_gib = 0.25\n"
        "[models.'chat@2']\n[aliases.kept]\nsplit = {'chat@1' = 1, 'chat@2' = 1}\n"
    )
    switched, refused = 0, list[str]()
    with (
        fleet(toml) as server,
        operator(server.url, 300) as admin,
        Users(server.url, users, _ask) as load,
    ):
        load.more(answers)
        for _ in range(turns):
            for action in (f"chat@2/promote?watch={watch:g}", "chat/rollback"):
                answer = admin.post(f"/admin/models/{action}")
                switched += answer.status_code == 200
                if answer.status_code != 200:
                    refused.append(answer.text[:300])
                load.more(answers)
    return Findings(
        title="Upgrades under load",
        figures=(
            Figure(f"failed or dropped requests, c = {users}", len(load.failures), 0, "at most", ""),
            Figure("switches of version", switched, 2 * turns, unit=""),
            Figure("answers", load.answered, unit=""),
        ),
        notes=(*load.failures[:5], *refused[:5]),
    )


def _ask(client: httpx.Client, number: int) -> int:
    """Half of the users stream. Raises `ValueError` for an answer that isn't whole."""
    words = {"model": "chat", "prompt": f"User {number} asks:", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    if number % 2:
        answer = client.post("/v1/completions", json=words)
        if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != TOKENS:
            raise ValueError(f"{answer.status_code} {answer.text[:200]}")
        return TOKENS
    with client.stream("POST", "/v1/completions", json={**words, "stream": True, "stream_options": {"include_usage": True}}) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]" or json.loads(events[-2])["usage"]["completion_tokens"] != TOKENS:
        raise ValueError(f"a stream broke off: {events[-1:]}")
    return TOKENS
