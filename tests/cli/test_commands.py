"""The commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.command_line import Cli, QuickCli
from cli.protocol_server import ProtocolServer


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, "headrace 0.1.0\n")


def test_version_imports_nothing_heavy(cli: Cli) -> None:
    heavy = {"openvino", "fastapi", "uvicorn", "httpx", "numpy", "headrace.config", "tokenizers"}
    script = (
        "import sys\nfrom headrace.cli.main import app\n"
        f"try: app(['--version'])\nexcept SystemExit: pass\nprint(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=cli.folder, check=True)
    assert done.stdout == "headrace 0.1.0\n[]\n"


@pytest.mark.parametrize("command", ["serve", "chat", "pull", "models", "ps", "bench", "doctor", "config"])
def test_help(quick: QuickCli, command: str) -> None:
    done = quick(command, "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout


def test_serve_has_the_promised_options(quick: QuickCli) -> None:
    said = quick("serve", "--help").stdout
    promised = "--name --context --threads --host --port --config --insecure-no-auth --max-workers --weights --log-level"
    for option in promised.split():
        assert option in said


def test_a_bad_configuration_is_said_without_a_traceback(quick: QuickCli) -> None:
    (quick.folder / "headrace.toml").write_text("prot = 1\n")
    for command in ("serve", "config", "doctor", "models"):
        done = quick(command)
        assert done.returncode == 2
        assert done.stderr == f"headrace: {quick.folder / 'headrace.toml'}, line 1: prot is not a known key; did you mean port?\n"
        assert done.stdout == ""


def test_a_bad_variable_stops_serve(cli: Cli) -> None:
    done = cli("serve", env={"HEADRACE_PROT": "1"})
    assert done.returncode == 2
    assert "HEADRACE_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_config_shows_origins_and_hides_secrets(quick: QuickCli) -> None:
    (quick.folder / "headrace.toml").write_text("drain_timeout = 3\n")
    (quick.folder / ".env").write_text("MODEL_PATH=echo\nUNRELATED=1\n")
    env = {"HEADRACE_API_KEYS": "sk-hidden", "HEADRACE_REMOTE_API_KEY": "sk-hidden", "LOG_LEVEL": "INFO"}
    done = quick("config", "--json", "--port", "9", env=env)
    assert done.returncode == 0
    assert "sk-hidden" not in done.stdout
    said = json.loads(done.stdout)
    assert said["drain_timeout"]["value"] == 3.0
    assert said["drain_timeout"]["source"] == "toml"
    assert said["drain_timeout"]["origin"].endswith("headrace.toml, line 1: drain_timeout")
    assert said["model"] == {"value": "echo", "source": ".env", "origin": ".env: MODEL_PATH"}
    assert said["port"] == {"value": 9, "source": "flag", "origin": "flag --port"}
    assert said["log_level"] == {"value": "info", "source": "environment", "origin": "environment LOG_LEVEL"}
    assert said["host"] == {"value": "127.0.0.1", "source": "default", "origin": "default"}
    assert said["api_keys"]["value"] == ["***"]
    assert said["remote_api_key"]["value"] == "***"

    shown = quick("config", env=env).stdout
    assert "sk-hidden" not in shown
    assert "environment LOG_LEVEL" in shown
    assert all(name in shown for name in said)


def test_models_lists_the_catalog_and_the_empty_cache(quick: QuickCli) -> None:
    said = json.loads(quick("models", "--json").stdout)
    default = said["catalog"][0]
    assert default["name"] == "smollm2-135m-instruct"
    assert (default["licence"], default["cached"]) == ("Apache-2.0", False)
    assert default["size"] == 98_362_432
    assert said["cache"] == []
    shown = quick("models").stdout
    assert all(entry["name"] in shown for entry in said["catalog"]), "a name that is broken over two lines can't be copied"
    assert "nothing yet" in shown
    assert not (quick.folder / "cache").exists()


def test_pull_of_nonsense_is_one_message(quick: QuickCli) -> None:
    done = quick("pull", "no-such-model")
    assert done.returncode == 1
    assert done.stderr.startswith("headrace: There is no model 'no-such-model'")
    assert "Traceback" not in done.stderr


def test_doctor(quick: QuickCli) -> None:
    done = quick("doctor", "echo", "--json", "--port", "0")
    assert done.returncode == 0, done.stdout
    said = json.loads(done.stdout)
    assert said["ok"] is True
    names = {check["name"] for check in said["checks"]}
    assert {"Python", "Packages", "Cores", "Processor", "Memory", "Model", "Cache", "Address"} <= names
    shown = quick("doctor", "--port", "0")
    assert "Headrace can serve here." in shown.stdout
    assert "it will be downloaded at the first start" in shown.stdout


def test_doctor_finds_what_makes_serving_impossible(quick: QuickCli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = quick("doctor", "no-such-model", "--json", "--port", port)
        assert done.returncode == 1
        said = json.loads(done.stdout)
        assert said["ok"] is False
        failed = {check["name"]: check for check in said["checks"] if check["status"] == "failed"}
        assert set(failed) == {"Model", "Address"}
        assert "is in use" in failed["Address"]["detail"]
        assert all(check["advice"] for check in failed.values())
        assert quick("doctor", "echo", "--port", port).returncode == 1
    assert quick("doctor", "echo", "--port", "0", "--host", "0.0.0.0").returncode == 1


def test_ps(quick: QuickCli, protocol_server: ProtocolServer) -> None:
    done = quick("ps", "--json", "--url", protocol_server.url, "--key", "sk-admin")
    assert done.returncode == 0
    assert json.loads(done.stdout)["workers"] == [
        {"pid": 17, "model": "small", "state": "ready", "restarts": 0, "running": 1, "waiting": 2, "memory_mib": 420.5}
    ]
    assert protocol_server.headers[0]["authorization"] == "Bearer sk-admin"
    table = quick("ps", "--url", protocol_server.url).stdout
    assert "ready" in table
    assert "PID" in table


def test_ps_finds_the_configured_server_and_shows_it_the_configured_key(quick: QuickCli, protocol_server: ProtocolServer) -> None:
    port = protocol_server.url.rpartition(":")[2]
    assert quick("ps", "--json", env={"API_PORT": port, "HEADRACE_API_KEYS": "sk-one,sk-two"}).returncode == 0
    assert protocol_server.headers[0]["authorization"] == "Bearer sk-one"
    assert quick("ps", "--json", "--url", protocol_server.url, env={"HEADRACE_API_KEYS": "sk-one"}).returncode == 0
    assert "authorization" not in protocol_server.headers[1]


def test_a_server_that_is_away(cli: Cli) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for command in (["ps"], ["ps", "--json"], ["chat"], ["bench"]):
            where = [url] if command == ["bench"] else ["--url", url]
            done = cli(*command, *where, stdin="hello\n")
            assert done.returncode == 1
            assert "No server answers" in done.stderr
            assert "Traceback" not in done.stderr
            assert done.stdout == ""


def test_ps_refused(quick: QuickCli, protocol_server: ProtocolServer) -> None:
    protocol_server.plan = "forbid"
    done = quick("ps", "--url", protocol_server.url)
    assert done.returncode == 1
    assert "only on its own machine" in done.stderr


def test_bench_json_is_one_object_and_nothing_else(cli: Cli, protocol_server: ProtocolServer) -> None:
    done = cli("bench", protocol_server.url, "--users", "3", "--requests", "9", "--max-tokens", "5", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["requests"], said["users"], said["errors"], said["succeeded"]) == (9, 3, 0, 9)
    for name in ("total_time", "mean_time", "qps", "output_tokens_per_second"):
        assert said[name] > 0
    for name in ("ttft", "tpot"):
        assert set(said[name]) == {"p50", "p90", "p99"}
    assert "9/9" in done.stderr


def test_bench_prints_the_tutorials_figures(quick: QuickCli, protocol_server: ProtocolServer) -> None:
    shown = quick("bench", protocol_server.url, "-u", "2", "-n", "4", "--native").stdout
    for title in ("Requests", "Users", "Total time", "Mean time", "QPS", "tok/s", "TTFT p50/p90/p99", "TPOT p50/p90/p99", "Errors"):
        assert title in shown


def test_bench_where_all_fails(quick: QuickCli, protocol_server: ProtocolServer) -> None:
    protocol_server.plan = "busy"
    done = quick("bench", protocol_server.url, "-u", "2", "-n", "4", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["errors_by_kind"] == {"http 503 overloaded": 4}


def test_chat_keeps_the_history(cli: Cli, protocol_server: ProtocolServer) -> None:
    said = "hello\n\nand\u2028again\n/reset\nnew\n/quit\nnever sent\n"
    done = cli("chat", "--url", protocol_server.url, "--system", "Be kind.", stdin=said)
    assert done.returncode == 0, done.stderr
    answer = "Hello there\u2028friend"
    assert done.stdout == f"{answer}\n" * 3
    system = {"role": "system", "content": "Be kind."}
    first = {"role": "user", "content": "hello"}
    assert [body["messages"] for body in protocol_server.bodies] == [
        [system, first],
        [system, first, {"role": "assistant", "content": answer}, {"role": "user", "content": "and\u2028again"}],
        [system, {"role": "user", "content": "new"}],
    ]
    assert all(body["stream"] is True and body["model"] == "small" for body in protocol_server.bodies)
    assert {body["temperature"] for body in protocol_server.bodies} == {0.7}, "as on /chat: at 1 a small model talks nonsense"


def test_chat_takes_a_temperature(cli: Cli, protocol_server: ProtocolServer) -> None:
    assert cli("chat", "--url", protocol_server.url, "--temperature", "0", stdin="hello\n").returncode == 0
    assert [body["temperature"] for body in protocol_server.bodies] == [0]


def test_chat_cannot_be_made_to_control_the_terminal(cli: Cli, protocol_server: ProtocolServer) -> None:
    protocol_server.words = ["\x1b[2J", "tab\tand\nline", "\x9b"]
    assert cli("chat", "--url", protocol_server.url, stdin="x\n").stdout == "\ufffd[2Jtab\tand\nline\ufffd\n"


def test_chat_says_the_servers_reason_and_takes_the_turn_back(cli: Cli, protocol_server: ProtocolServer) -> None:
    protocol_server.plan = "busy"
    done = cli("chat", "--url", protocol_server.url, stdin="one\ntwo\n")
    assert done.returncode == 1
    assert done.stderr == "headrace: Too many are waiting. (HTTP 503)\n" * 2
    assert [len(body["messages"]) for body in protocol_server.bodies] == [1, 1]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Where the tests were started in the background of a script, Ctrl-C is ignored, and by their children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_answer_and_not_the_program(cli: Cli, protocol_server: ProtocolServer, clean_env: dict[str, str]) -> None:
    protocol_server.plan = "hang"
    chat = subprocess.Popen(
        [sys.executable, "-m", "headrace", "chat", "--url", protocol_server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cli.folder,
        env=clean_env,
    )
    assert chat.stdin is not None
    assert chat.stdout is not None
    try:
        chat.stdin.write(b"one\n")
        chat.stdin.flush()
        assert os.read(chat.stdout.fileno(), 100) == b"Hello"
        chat.send_signal(signal.SIGINT)
        assert protocol_server.hung_up.wait(10)
        protocol_server.plan = "answer"
        out, err = chat.communicate(b"two\n", timeout=20)
    finally:
        chat.kill()
        chat.wait()
    assert out.decode() == "\nHello there\u2028friend\n"
    assert err.decode() == "(stopped)\n"
    assert chat.returncode == 0
    assert [message["content"] for message in protocol_server.bodies[1]["messages"]] == ["one", "Hello", "two"]


def test_start_is_quick(cli: Cli) -> None:
    """Under 0.3 s on an idle machine; of the processor's time, which a busy one stretches less, and with some room."""

    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        cli("--version")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(spent() < 0.6 for _ in range(5))


def test_not_a_config_file(quick: QuickCli) -> None:
    done = quick("serve", "--config", str(Path("away.toml")))
    assert (done.returncode, done.stderr) == (2, "headrace: flag --config: there is no file away.toml.\n")
