from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bench.__main__ import NAMES, main
from bench.api_cpu import solve
from bench.fairness import sequences_inside
from bench.figures import Figure, Findings, Side, as_markdown, quantile, ratio
from bench.options import parser_for
from bench.others import OthersWatch
from bench.rounds import interleave
from bench.servers import ServerFailed, clean_environment, find_llama_server
from bench.sides.prompts import texts
from bench.turns import Asked, side, speed
from hypothesis import given
from hypothesis import strategies as st


def test_sides_take_turns_in_alternating_order_after_a_warm_up() -> None:
    asked: list[tuple[str, int]] = []

    def measure(name: str) -> Callable[[int], float]:
        def once(number: int) -> float:
            asked.append((name, number))
            return float(number)

        return once

    values = interleave({"a": measure("a"), "b": measure("b")}, 3, say=lambda _: None)
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]
    assert values == {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}


def test_a_ratio_is_of_medians_and_knows_its_bound() -> None:
    ours, theirs = Side("ours", (10.0, 300.0, 20.0), "tok/s"), Side("theirs", (10.0, 1.0, 11.0), "tok/s")
    assert ratio("x", ours, theirs).value == 2.0
    assert ratio("x", ours, theirs).met is None
    assert ratio("x", ours, theirs, bound=2.0).met is True
    assert ratio("x", ours, theirs, bound=2.1).met is False
    assert ratio("x", ours, theirs, bound=1.9, sense="at most").met is False


def test_the_table_shows_value_bound_verdict_and_range() -> None:
    figure = ratio("speed", Side("a", (1.0, 3.0), "tok/s"), Side("b", (4.0,), "tok/s"), bound=1.0)
    table = as_markdown(Findings("t", (figure,), ("A note.",)))
    assert "| speed | 0.500 × | ≥ 1.00 × | NO | a: 2.00 tok/s (1.00 to 3.00); b: 4.00 tok/s |" in table
    assert table.endswith("A note.")
    assert not Findings("t", (figure,)).met
    assert Findings("t", (Figure("free", 1.0),)).met


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_quantiles_stay_within_the_values(values: list[float], q: float) -> None:
    assert min(values) - 1e-6 <= quantile(values, q) <= max(values) + 1e-6
    assert quantile(values, 0) == min(values)
    assert quantile(values, 1) == max(values)


@given(st.floats(0, 1e4), st.floats(0, 100))
def test_two_workloads_are_solved_for_request_and_token(request_cost: float, token_cost: float) -> None:
    found = solve(1, request_cost + token_cost, 257, request_cost + 257 * token_cost)
    assert found == pytest.approx((request_cost, token_cost), abs=1e-6)


def test_no_two_prompts_of_any_rounds_are_alike() -> None:
    prompts = [text for number in range(20) for text in texts(16, number)]
    assert len(set(prompts)) == len(prompts)


def test_options_come_from_the_signature() -> None:
    def run(*, users: tuple[int, ...] = (1, 4), rounds: int = 5, gguf: str | None = None, threads: int | None = None) -> None:
        """For its signature."""

    parser = parser_for(run, prog="x", description="")
    assert vars(parser.parse_args([])) == {"users": (1, 4), "rounds": 5, "gguf": None, "threads": None, "record": False}
    given_words = ["--users", "2,8", "--rounds", "1", "--gguf", "f", "--threads", "2", "--record"]
    assert vars(parser.parse_args(given_words)) == {"users": (2, 8), "rounds": 1, "gguf": "f", "threads": 2, "record": True}


def test_an_option_of_an_unknown_type_is_refused() -> None:
    def run(*, what: dict[str, Any]) -> None:
        """For its signature."""

    with pytest.raises(TypeError, match="dict"):
        parser_for(run, prog="x", description="")


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_options_and_a_summary(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "--record" in capsys.readouterr().out


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)


def test_a_side_that_dies_is_a_clear_error() -> None:
    with pytest.raises(ServerFailed, match="ended with status 1"), side("broken", "bench.no_such_side"):
        pass


def test_a_missing_peer_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"build_llama_server\.sh"):
        find_llama_server(str(tmp_path / "nothing"))


def test_servers_under_test_see_no_configuration_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_MODEL", "x")
    monkeypatch.setenv("MAX_WORKERS", "3")
    monkeypatch.setenv("HEADRACE_CACHE", "/somewhere")
    environment = clean_environment()
    assert "HEADRACE_MODEL" not in environment
    assert "MAX_WORKERS" not in environment
    assert environment["HEADRACE_CACHE"] == "/somewhere"


def test_sequences_are_read_from_the_metrics() -> None:
    text = '# HELP headrace_sequences_running x\nheadrace_sequences_running{model="m"} 3.0\nheadrace_sequences_waiting{model="m"} 61.0\n'
    assert sequences_inside(text) == 64


def test_our_own_work_and_our_childrens_is_not_others_work() -> None:
    watch = OthersWatch()
    spin = "import time\nend = time.perf_counter() + 0.5\nwhile time.perf_counter() < end: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    ours = sum(os.times()[:4])
    assert ours > 0
    assert 0 <= watch.share() <= 1
    assert "of the machine" in watch.note()


def test_too_few_tokens_are_not_speed() -> None:
    with side_of(["{}", '{"tokens": 3, "seconds": 1.0}']) as asked:
        answer = asked.ask(round=1)
        assert speed(asked, answer, 3) == 3.0
        with pytest.raises(ServerFailed, match="asked for 4 tokens and gave 3"):
            speed(asked, answer, 4)


@contextmanager
def side_of(answers: list[str]) -> Iterator[Asked]:
    code = "import sys\nfor line in sys.argv[1:]: print(line, flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", code, *answers]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Asked("a side", process)
        process.kill()
