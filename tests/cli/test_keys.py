"""The commands for keys, tenants and the audit log, on a database without a server."""

from __future__ import annotations

import getpass
import json
import re
from pathlib import Path

import pytest

from cli.command_line import QuickCli
from headrace.stores.database import Database


def test_a_secret_is_alone_on_the_standard_output(quick: QuickCli) -> None:
    done = quick("keys", "create", "--name", "app")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"hr-[0-9A-Za-z]{43}\n", done.stdout)
    assert done.stdout.strip() not in quick("keys", "list", "--json").stdout + quick("audit", "--json").stdout


def test_a_keys_life(quick: QuickCli) -> None:
    words = ("--tenant", "acme", "--models", "a, b", "--scopes", "inference,usage", "--rpm", "7", "--tpm", "8", "--concurrency", "9")
    made = json.loads(
        quick("keys", "create", "--name", "app", *words, "--budget-tokens", "10", "--period", "day", "--expires", "30d", "--json").stdout
    )
    assert made["secret"].startswith(made["prefix"])
    key = json.loads(quick("keys", "show", made["id"], "--json").stdout)
    assert key == {name: value for name, value in made.items() if name != "secret"}
    assert (key["tenant"], key["models"], key["scopes"]) == ("acme", ["a", "b"], ["inference", "usage"])
    assert (key["rpm"], key["tpm"], key["concurrency"], key["budget_tokens"], key["budget_period"]) == (7, 8, 9, 10, "day")
    assert key["expires_at"] - key["created_at"] == pytest.approx(30 * 86400, abs=60)
    _, line = quick("keys", "list").stdout.splitlines()
    assert re.split(r"\s\s+", line.strip()) == [made["id"], made["prefix"] + "…", "app", "active", "acme", "a, b", "inference, usage"]
    shown = quick("keys", "show", made["id"]).stdout
    assert "7/min requests" in shown
    assert "10 tokens a day" in shown

    rotated = json.loads(quick("keys", "rotate", made["id"], "--grace", "1h", "--json").stdout)
    assert rotated["secret"] != made["secret"]
    assert json.loads(quick("keys", "revoke", made["id"], "--json").stdout)["status"] == "revoked"
    assert json.loads(quick("keys", "list", "--json").stdout)["keys"][0]["status"] == "revoked"
    assert "revoked" in quick("keys", "list").stdout
    again = quick("keys", "rotate", made["id"])
    assert again.returncode == 1
    assert "revoked" in again.stderr

    entries = json.loads(quick("audit", "--json").stdout)["entries"]
    assert [entry["action"] for entry in entries] == ["key.create", "key.rotate", "key.revoke"]
    assert {entry["actor"] for entry in entries} == {f"cli:{getpass.getuser()}"}
    assert json.loads(quick("audit", "--json", "--since", "2100-01-01").stdout)["entries"] == []
    assert "key.revoke" in quick("audit", "--since", "1h").stdout


def test_administrators_of_all_and_of_one(quick: QuickCli) -> None:
    every = json.loads(quick("keys", "create", "--name", "a", "--scopes", "admin", "--json").stdout)
    one = json.loads(quick("keys", "create", "--name", "b", "--scopes", "admin", "--tenant", "acme", "--json").stdout)
    assert (every["all_tenants"], one["all_tenants"]) == (True, False)


def test_tenants(quick: QuickCli) -> None:
    assert quick("tenants", "create", "acme", "--rpm", "5", "--budget-tokens", "100", "--period", "total").returncode == 0
    assert quick("tenants", "create", "acme").returncode == 2
    assert quick("tenants", "set", "nope", "--rpm", "5").returncode == 2
    assert quick("tenants", "set", "acme", "--rpm", "0", "--concurrency", "3").returncode == 0
    (tenant,) = json.loads(quick("tenants", "list", "--json").stdout)["tenants"]
    assert (tenant["rpm"], tenant["concurrency"], tenant["budget_tokens"], tenant["budget_period"]) == (None, 3, 100, "total")
    assert "100 tokens in total" in quick("tenants", "list").stdout
    assert quick("tenants", "set", "acme", "--period", "day").returncode == 0
    for words in (("set", "acme", "--budget-tokens", "0", "--period", "day"), ("create", "new", "--period", "day")):
        refused = quick("tenants", *words)
        assert (refused.returncode, "set `budget_tokens`, too" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ("create",),
        ("create", "--name", "x", "--scopes", "root"),
        ("create", "--name", "x", "--scopes", ","),
        ("create", "--name", "x", "--expires", "soon"),
        ("create", "--name", "x", "--period", "week"),
        ("create", "--name", "x", "--period", "day"),
        ("create", "--name", "x", "--rpm", "0"),
        ("create", "--name", "x", "--models", ""),
        ("create", "--name", "x", "--models", " ,"),
        ("create", "--name", "x", "--expires", "2001-01-01"),
        ("show", "key_nope"),
        ("revoke", "key_nope"),
        ("rotate", "key_nope", "--grace", "long"),
    ],
)
def test_mistakes_are_one_message(quick: QuickCli, words: tuple[str, ...]) -> None:
    done = quick("keys", *words)
    assert done.returncode in (1, 2)
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_another_pepper_is_noticed(quick: QuickCli, tmp_path: Path) -> None:
    quick("keys", "create", "--name", "app")
    (tmp_path / ".local/share/headrace/pepper").write_bytes(b"x" * 32)
    done = quick("keys", "list")
    assert done.returncode == 2
    assert "pepper" in done.stderr


def test_a_database_that_is_away_is_one_message(quick: QuickCli) -> None:
    done = quick("keys", "list", env={"HEADRACE_DATABASE_URL": "postgresql://h:secret-word@127.0.0.1:1/d"})
    assert done.returncode == 1
    assert "can't be used" in done.stderr
    assert "secret-word" not in done.stderr


def test_keys_live_where_the_configuration_says(quick: QuickCli, tmp_path: Path, empty_postgres_url: str) -> None:
    (tmp_path / "headrace.toml").write_text(f'database_url = "{empty_postgres_url}"\ndata_dir = "{tmp_path}/state"\n')
    assert quick("keys", "create", "--name", "app").returncode == 0
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["pepper"]
    assert not Database(empty_postgres_url).is_sqlite
    assert len(json.loads(quick("keys", "list", "--json").stdout)["keys"]) == 1
