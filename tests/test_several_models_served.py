"""Servers of several models, with real processes: loading on first use, eviction, aliases, upgrades, replicas."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow


class Fleet(RunningServer):
    """A server of the models in `toml`, and no other."""

    def __init__(self, folder: Path, toml: str, *flags: str, environment: dict[str, str] | None = None) -> None:
        (folder / "headrace.toml").write_text(toml)
        super().__init__(folder, "echo", *flags, environment=environment)
        self._command.remove("echo")

    def ask(self, model: str | None, content: str = "hi", **more: Any) -> httpx.Response:
        timeout = more.pop("timeout", None)
        headers = {"X-Request-Timeout": str(timeout)} if timeout else {}
        headers |= {"Authorization": f"Bearer {more.pop('key')}"} if "key" in more else {}
        return self.client.post(
            "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": content}], **more}, headers=headers
        )

    def said(self, model: str | None, content: str = "hi", **more: Any) -> str:
        answer = self.ask(model, content, **more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def admin(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get("/admin/models").raise_for_status().json()
        return found

    def states(self) -> dict[str, str]:
        return {model["name"]: model["state"] for model in self.admin()["models"]}

    def do(self, name: str, action: str) -> httpx.Response:
        return self.client.post(f"/admin/models/{name}/{action}")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "headrace", "models", *words, "--url", self.url]
        return subprocess.run(line, capture_output=True, text=True, env=self.environment, timeout=60, check=False)


BUDGET_FOR_TWO = f"memory_budget_gib = {2.5 * 64 / 1024}\n"


def test_models_come_when_they_are_asked_for_and_make_room_for_each_other(tmp_path: Path) -> None:
    toml = (
        BUDGET_FOR_TWO
        + """
        [models.a]
        model = "echo?says=I am a"
        [models.b]
        model = "echo?says=I am b"
        keep_alive = "1s"
        max_tokens = 3
        [models.c]
        model = "echo?pace=0.05"
        [models.large]
        model = "echo?memory=999"
        """
    )
    with Fleet(tmp_path, toml) as server:
        assert server.states() == {"a@1": "ready", "b@1": "absent", "c@1": "absent", "large@1": "absent"}
        assert server.said(None) == server.said("a") == server.said("a@1") == "I am a"
        # Streams get comments while the model is loaded, and default sampling holds for them.
        assert server.said("b") == "I a"
        assert server.said("b", max_tokens=6) == "I am b"
        listed = {each["id"]: each["state"] for each in server.client.get("/v1/models").json()["data"]}
        assert listed["b"] == "ready"
        assert listed["c"] == "absent"
        assert {line["model"] for line in server.ps()["workers"]} == {"a", "b"}

        too_large = server.ask("large")
        assert (too_large.status_code, too_large.json()["error"]["code"]) == (503, "model_too_large")
        assert "1.04 GiB" in too_large.text
        assert "0.16 GiB" in too_large.text

        with ThreadPoolExecutor(2) as aside:
            # One of them has to go, and a long answer under way isn't it.
            long = aside.submit(server.said, "a", "x", max_tokens=5)
            assert long.result() == "I am"[:5] or long.result() == "I am "
            running = aside.submit(server.said, "c", "w" * 60)
            eventually(lambda: server.states()["c@1"] == "ready")
            busy = {name for name, state in server.states().items() if state == "ready"}
            assert len(busy) == 2
            assert "c@1" in busy
            assert running.result() == "w" * 60
        server.said("b")
        eventually(lambda: server.states()["b@1"] == "absent", what="unloading b when it is idle")
        assert server.said("b") == "I a"


def test_a_pinned_model_stays_and_who_finds_no_room_is_told_when_its_time_is_over(tmp_path: Path) -> None:
    toml = (
        BUDGET_FOR_TWO
        + """
        [models.pinned]
        model = "echo?says=always"
        pinned = true
        [models.slow]
        model = "echo?pace=0.1"
        [models.other]
        model = "echo?says=other"
        """
    )
    with Fleet(tmp_path, toml) as server, ThreadPoolExecutor(1) as aside:
        running = aside.submit(server.said, "slow", "w" * 45)
        eventually(lambda: server.states()["slow@1"] == "ready")
        refused = server.ask("other", timeout=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_loaded")
        assert refused.headers["retry-after"]
        assert "pinned" in refused.text
        assert server.said("other", timeout=25) == "other"
        assert running.result() == "w" * 45
        assert server.do("pinned", "unload").status_code == 409
        assert server.states()["pinned@1"] == "ready"
        assert server.do("slow", "load").json()["state"] == "ready"
        assert server.states()["other@1"] == "absent"
        assert server.command("unload", "slow").stdout == "slow@1 is absent.\n"
        assert server.command("unload", "nope").returncode == 1


VERSIONS = """
upgrade_watch = 1.0
upgrade_min_requests = 3
[models.chat]
model = "echo?says=the old answer"
[models."chat@2"]
model = "echo?says=the new answer"
aliases = ["canary"]
[models."chat@3"]
model = "echo?says=something else entirely"
[models."chat@slow"]
model = "echo?says=the old answer&pace=0.2"
golden = []
[aliases.mix]
split = {"chat@1" = 1, "chat@2" = 1}
[aliases.watched]
to = "chat@1"
shadow = "chat@2"
"""


def test_an_alias_splits_by_caller_and_shadows(tmp_path: Path) -> None:
    keys = [f"key-number-{number:02d}" for number in range(12)]
    with Fleet(tmp_path, VERSIONS, environment={"HEADRACE_API_KEYS": ",".join(keys)}) as server:
        first = {key: server.said("mix", key=key) for key in keys}
        assert set(first.values()) == {"the old answer", "the new answer"}
        assert {key: server.said("mix", key=key) for key in keys} == first
        before = server.client.get("/metrics", headers={"Authorization": f"Bearer {keys[0]}"}).status_code
        assert before == 200
        for _ in range(3):
            assert server.said("watched", key=keys[0]) == "the old answer"
        headers = {"Authorization": f"Bearer {keys[0]}"}

        def shadows() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = server.admin()["shadows"]
            return [each for each in found if each["compared"] == 3]

        (shadow,) = eventually(shadows)
        assert (shadow["model"], shadow["shadow"], shadow["failed"]) == ("chat@1", "chat@2", 0)
        assert shadow["likeness"] == pytest.approx(2 / 3, abs=1e-3)
        usage = server.client.get("/usage", headers=headers, params={"group_by": "model"}).json()
        assert "shadow" not in json.dumps(usage)


def test_a_version_goes_live_under_load_and_bad_ones_go_back_by_themselves(tmp_path: Path) -> None:
    with Fleet(tmp_path, VERSIONS) as server:
        said: list[tuple[int, str]] = []
        over = threading.Event()

        def keep_asking() -> None:
            with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as client:
                while not over.is_set():
                    answer = client.post("/chat", json={"prompt": "x", "model": "chat"})
                    said.append((answer.status_code, answer.json().get("response", answer.text)))

        clients = [threading.Thread(target=keep_asking) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            eventually(lambda: len(said) > 20)
            promoted = server.command("promote", "chat@2")
            assert (promoted.returncode, promoted.stdout) == (0, "chat@2 took over from chat@1.\n"), promoted.stderr
            assert server.said("chat") == "the new answer"

            drifted = server.do("chat@3", "promote")
            assert drifted.status_code == 409
            assert "golden prompts" in drifted.text
            assert server.said("chat") == "the new answer"

            slow = server.command("promote", "chat@slow", "--watch", "30")
            assert slow.returncode == 1
            assert "first tokens" in slow.stderr
            assert server.said("chat") == "the new answer"
            assert server.admin()["upgrades"]["chat"]["state"] == "rolled back"

            back = server.command("rollback", "chat")
            assert back.returncode == 0, back.stderr
            assert server.said("chat") == "the old answer"
        finally:
            over.set()
            for client in clients:
                client.join(30)
        assert {status for status, _ in said} == {200}
        assert {text for _, text in said} == {"the old answer", "the new answer"}
        eventually(lambda: server.states()["chat@slow"] == "absent", what="the slow version to leave")
        server.do("chat@2", "promote")
    with Fleet(tmp_path, VERSIONS) as again:
        assert again.states()["chat@1"] == "absent", "the version that is current is the one to begin with"
        assert again.said("chat") == "the new answer"
        assert again.do("chat", "rollback").json()["new"] == "chat@1"
        assert again.said("chat") == "the old answer"


def test_streams_of_a_replica_that_dies_go_on_at_another(tmp_path: Path) -> None:
    text = "abcdefgh" * 8
    with Fleet(tmp_path, '[models.m]\nmodel = "echo?pace=0.03"\nreplicas = 2\n') as server:
        eventually(lambda: [worker["state"] for worker in server.ps()["workers"]] == ["ready", "ready"])
        workers = server.ps()["workers"]
        with ThreadPoolExecutor(6) as aside:
            answers = [aside.submit(server.said, "m", text) for _ in range(6)]
            # Both have some of them.
            eventually(lambda: all(worker["running"] for worker in server.ps()["workers"]))
            os.kill(workers[0]["pid"], signal.SIGKILL)
            assert [answer.result() for answer in answers] == [text] * 6
        assert server.events("engine lost")[0]["requests"] >= 1
        assert server.states() == {"m@1": "ready"}


def test_a_reload_brings_a_new_version_and_changes_none(tmp_path: Path) -> None:
    before = '[aliases.quick]\nto = "chat"\n[models.chat]\nmodel = "echo?says=one"\ngolden = []\naliases = ["talk"]\n'
    after = before + '[models."chat@2"]\nmodel = "echo?says=two"\n'
    with Fleet(tmp_path, before) as server:
        (tmp_path / "headrace.toml").write_text(after.replace("one", "another"))
        refused = server.client.post("/admin/reload")
        assert refused.status_code == 422
        assert "add a version of it" in refused.text
        assert server.ask("chat@2").status_code == 404
        (tmp_path / "headrace.toml").write_text(after)
        assert server.client.post("/admin/reload").json()["changed"] == ["models"]
        assert httpx.post(f"{server.url}/admin/models/chat@2/promote", params={"watch": 0}, headers=server.operator()).status_code == 200
        said = httpx.post(f"{server.url}/chat", json={"prompt": "x", "model": "chat"}).json()
        assert (said["response"], said["model"]) == ("two", "chat@2")
        # All names of the family stand for the new version, and the old one leaves.
        for name in ("chat", "talk", "quick", "chat@2"):
            shown = server.client.get(f"/admin/models/{name}").json()
            assert (shown["name"], shown["aliases"], shown["current"]) == ("chat@2", ["chat", "talk"], True)
        eventually(lambda: server.states()["chat@1"] == "absent", what="the old version's leave")
        assert server.client.get("/admin/models/chat@1").json()["aliases"] == []
        unknown = server.client.get("/admin/models/nobody")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('[models.a]\nmodel = "echo"\nreplica = 2\n', "line 3: models.a.replica is not a known key; did you mean replicas?"),
        ('[models.a]\nmodel = "echo"\n[aliases.x]\nto = "b"\n', "there is no model 'b'"),
        ("[models.a]\nreplicas = 2\n", "doesn't say which `model`"),
        ('[models.a]\nmodel = "no-such-model"\n', "no-such-model"),
        ('memory_budget_gib = 0.01\n[models.a]\nmodel = "echo"\npinned = true\n', "0.06 GiB (a@1)"),
    ],
)
def test_a_start_is_refused(tmp_path: Path, toml: str, said: str) -> None:
    server = Fleet(tmp_path, toml)
    server.start()
    assert server.process.wait(30) in (1, 2)
    assert said in " ".join(server.log.split())
