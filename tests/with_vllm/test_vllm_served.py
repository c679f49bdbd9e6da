"""A whole server over the vllm engine: it answers, shows its figures, goes on when vLLM dies, and leaves nothing behind."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from running_server import RunningServer, alive, eventually

ASKED = {"messages": [{"role": "user", "content": "Name three rivers in Europe."}], "temperature": 0}


def cores(server: RunningServer) -> list[int]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child.pid for child in children if "VLLM" in "".join(child.cmdline())]


def test_a_server_whose_vllm_dies(unpacked_model: Path, tmp_path: Path) -> None:
    environment = {"HEADRACE_KV_CACHE_GIB": "0.5", "HEADRACE_CONTEXT": "1024", "HEADRACE_GIVE_UP_AFTER": "600", "VLLM_CPU_CI_ENV": "1"}
    server = RunningServer(tmp_path, str(unpacked_model), "--engine", "vllm", environment=environment)
    server.start()
    try:
        server.url = eventually(lambda: next((line["url"] for line in server.events("ready")), ""), within=300, what="readiness")
        whole = _post(server, {**ASKED, "max_tokens": 20})
        assert whole["usage"]["completion_tokens"] == 20
        refused = _post(server, {**ASKED, "max_tokens": 20, "stop": whole["choices"][0]["message"]["content"][10:14]})
        assert refused["choices"][0]["finish_reason"] == "stop"
        assert _post(server, {**ASKED, "logit_bias": {"60000": 1}})["error"]["code"] in ("invalid_parameter", "invalid_request")

        first = cores(server)
        assert len(first) == 2
        with _stream(server, {**ASKED, "max_tokens": 300, "ignore_eos": True, "stream_options": {"include_usage": True}}) as stream:
            lines = stream.iter_lines()
            for line in lines:
                if line.startswith("data: "):
                    break
            psutil.Process(first[0]).send_signal(signal.SIGKILL)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert '"error"' not in "".join(rest)
        assert '"completion_tokens":300' in rest[-2].replace(" ", "")
        eventually(lambda: not any(map(alive, first)), what="the end of vLLM's processes")

        second = cores(server)
        worker = psutil.Process(second[0]).parent()
        assert worker is not None
        worker.kill()
        eventually(lambda: not any(map(alive, second)), what="the end of a killed worker's processes")
    finally:
        last = cores(server)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
    eventually(lambda: not any(map(alive, last)), what="the end of all processes")


def _post(server: RunningServer, body: dict[str, object]) -> dict[str, object]:
    import httpx

    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300, trust_env=False).json()


def _stream(server: RunningServer, body: dict[str, object]):
    import httpx

    return httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=600, trust_env=False)
