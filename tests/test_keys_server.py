"""Keys on a whole server with several API processes: made and revoked from outside while it runs."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from real_servers import PostgresServer
from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow


def headrace(server: RunningServer, *words: str) -> dict[str, Any]:
    """A command's JSON, in the server's environment."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *words, "--json"], capture_output=True, text=True, timeout=60, env=server.environment, check=True
    )
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def new_key(server: RunningServer, *words: str) -> dict[str, Any]:
    return headrace(server, "keys", "create", "--name", "k", *words)


def status(server: RunningServer, secret: str) -> int:
    """A connection of its own, so that any API process may get it."""
    headers = {"Authorization": f"Bearer {secret}"}
    return httpx.post(f"{server.url}/chat", json={"prompt": "x"}, headers=headers, trust_env=False, timeout=30).status_code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("keys"), "echo", "--host", "0.0.0.0", "--auth", "keys", "--max-workers", "3") as running:
        yield running


def test_keys_made_while_it_runs_work_and_end_within_a_second_everywhere(server: RunningServer) -> None:
    assert len(server.events("no key would be let in")) == 1
    assert status(server, "hr-" + "0" * 43) == 401
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/admin/ps").status_code == 401
    key = new_key(server)
    assert {status(server, key["secret"]) for _ in range(30)} == {200}
    headrace(server, "keys", "revoke", key["id"])
    revoked = time.monotonic()
    while time.monotonic() < revoked + 1.0:
        status(server, key["secret"])
    assert {status(server, key["secret"]) for _ in range(30)} == {401}


def test_an_administrator_makes_and_ends_keys_over_http(server: RunningServer) -> None:
    root = new_key(server, "--scopes", "inference,usage,admin")
    headers = {"Authorization": f"Bearer {root['secret']}"}
    made = server.client.post("/admin/keys", json={"name": "app"}, headers=headers).json()
    assert {status(server, made["secret"]) for _ in range(20)} == {200}
    assert server.client.delete(f"/admin/keys/{made['id']}", headers=headers).status_code == 200
    revoked = time.monotonic()
    while time.monotonic() < revoked + 1.0:
        status(server, made["secret"])
    assert {status(server, made["secret"]) for _ in range(20)} == {401}
    assert server.client.get("/admin/ps", headers=headers).json()["workers"]
    actors = [entry["actor"] for entry in headrace(server, "audit")["entries"] if entry["subject"] == made["id"]]
    assert actors == [root["id"], root["id"]]


def test_known_keys_go_on_while_postgresql_is_stopped(tmp_path: Path) -> None:
    with (
        PostgresServer() as postgres,
        RunningServer(
            tmp_path, "echo", "--auth", "keys", "--max-workers", "3", environment={"HEADRACE_DATABASE_URL": postgres.url}
        ) as server,
    ):
        known = new_key(server)
        assert status(server, known["secret"]) == 200
        late = new_key(server)
        postgres.stop()
        # Any process may get them, and only one has met the key.
        for _ in range(20):
            assert status(server, known["secret"]) == 200
        headers = {"Authorization": f"Bearer {late['secret']}"}
        refused = httpx.post(f"{server.url}/chat", json={"prompt": "x"}, headers=headers, trust_env=False, timeout=30)
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        assert str(postgres.port) not in refused.text, "where the database is concerns no caller"
        postgres.start()
        eventually(lambda: status(server, late["secret"]) == 200)
        headrace(server, "keys", "revoke", known["id"])
        eventually(lambda: status(server, known["secret"]) == 401, within=3)


def certificate(ca: trustme.CA, folder: Path) -> tuple[Path, Path]:
    issued = ca.issue_cert("localhost", "127.0.0.1")
    cert, key = folder / "cert.pem", folder / "key.pem"
    for path, pem in ((key, issued.private_key_pem.bytes()), (cert, b"".join(blob.bytes() for blob in issued.cert_chain_pems))):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(pem)
        fresh.replace(path)
    return cert, key


def serial(server: RunningServer, ca: Path) -> str:
    """The certificate's serial number, as openssl's own client sees it."""
    port = server.url.rpartition(":")[2]
    command = [
        "openssl",
        "s_client",
        "-connect",
        f"127.0.0.1:{port}",
        "-CAfile",
        str(ca),
        "-verify_return_error",
        "-servername",
        "localhost",
    ]
    seen = subprocess.run(command, input="", capture_output=True, text=True, timeout=20, check=True)
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-serial"], input=seen.stdout, capture_output=True, text=True, timeout=20, check=True
    )
    return shown.stdout


def test_https_with_a_certificate_that_is_renewed(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    cert, key = certificate(authority, tmp_path)
    with RunningServer(tmp_path, "echo", "--tls-cert", str(cert), "--tls-key", str(key)) as server:
        assert server.url.startswith("https://")
        first = serial(server, ca)
        trusting = ssl.create_default_context(cafile=ca)
        with httpx.Client(base_url=server.url, verify=trusting, trust_env=False) as kept:
            assert kept.post("/chat", json={"prompt": "x"}).json()["response"] == "x"
            certificate(authority, tmp_path)
            eventually(lambda: serial(server, ca) != first, what="the new certificate")
            assert kept.get("/health").status_code == 200  # on the connection that it has
            renewed = serial(server, ca)
            cert.write_text("half a certificate")
            eventually(lambda: server.events("the old certificate goes on"))
            assert serial(server, ca) == renewed
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", verify=ssl.create_default_context(), trust_env=False)


def test_clients_need_a_certificate_where_a_ca_for_them_is_set(tmp_path: Path) -> None:
    authority, clients = trustme.CA(), trustme.CA()
    ca, client_ca = tmp_path / "ca.pem", tmp_path / "clients.pem"
    authority.cert_pem.write_to_path(ca)
    clients.cert_pem.write_to_path(client_ca)
    cert, key = certificate(authority, tmp_path)
    with RunningServer(tmp_path, "echo", "--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(client_ca)) as server:
        context = ssl.create_default_context(cafile=ca)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health", verify=context, trust_env=False)
        clients.issue_cert("somebody@example.org").configure_cert(context)
        assert httpx.get(f"{server.url}/health", verify=context, trust_env=False).status_code == 200


def test_a_certificate_that_cannot_be_used_refuses_the_start(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("nothing")
    command = [sys.executable, "-m", "headrace", "serve", "echo", "--port", "0", "--tls-cert", str(tmp_path / "cert.pem")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=RunningServer(tmp_path).environment, check=False
    )
    assert done.returncode == 2
    assert "cert.pem" in done.stderr
    assert "Traceback" not in done.stderr
