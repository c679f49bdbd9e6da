from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from headrace.address import auth_at, bind, data_dir_at, leave_word, listen_privately, private_folder, url_of
from headrace.config import AccessSection, ServerSection
from headrace.errors import ConfigError

NOBODY = AccessSection()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.9.10"])
def test_loopback_needs_no_keys(host: str) -> None:
    with bind(ServerSection(host=host, port=0), NOBODY) as bound:
        assert url_of(bound).startswith("http://")
        assert bound.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_addresses_need_keys_or_courage(host: str) -> None:
    server = ServerSection(host=host, port=0)
    with pytest.raises(ConfigError, match="HEADRACE_API_KEYS"):
        bind(server, NOBODY)
    for access in (AccessSection(api_keys=("k",)), AccessSection(insecure_no_auth=True)):  # type: ignore[arg-type]
        try:
            bind(server, access).close()
        except ConfigError:
            assert host == "::", "only IPv6 may be missing"
            assert not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists()


def test_a_taken_port_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"in use.*--port"):
        bind(ServerSection(port=taken.getsockname()[1]), NOBODY)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "bad host", "x" * 300])
def test_what_is_no_address_here_is_refused(host: str) -> None:
    with pytest.raises(ConfigError):
        bind(ServerSection(host=host, port=0), AccessSection(insecure_no_auth=True))


def test_sockets_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 90)))
    folder = private_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(os.fsencode(folder)) <= 90
    with listen_privately(folder / "engine"):
        assert stat.S_IMODE((folder / "engine").stat().st_mode) == 0o600
    (folder / "engine").unlink()
    folder.rmdir()


def test_folders_of_servers_that_were_killed_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as base:  # pytest's own is too deep for sockets
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        killed, living = private_folder(), private_folder()
        listen_privately(killed / "engine").close()
        with listen_privately(living / "engine"):
            private_folder()
            assert not killed.exists()
            assert living.exists()


@pytest.mark.parametrize(
    ("host", "access", "mode"),
    [
        ("127.0.0.1", {}, "open"),
        ("127.0.0.1", {"api_keys": ("k",)}, "open"),
        ("127.0.0.1", {"auth": "keys"}, "keys"),
        ("0.0.0.0", {"api_keys": ("k",)}, "keys"),
        ("0.0.0.0", {"auth": "keys"}, "keys"),
        ("0.0.0.0", {"insecure_no_auth": True}, "open"),
        ("0.0.0.0", {"insecure_no_auth": True, "auth": "keys"}, "keys"),
        ("0.0.0.0", {"insecure_no_auth": True, "auth": "open"}, "open"),
    ],
)
def test_whether_callers_need_keys(host: str, access: dict[str, Any], mode: str) -> None:
    configured = AccessSection(**access)
    with bind(ServerSection(host=host, port=0), configured) as bound:
        assert auth_at(bound, configured) == mode


@pytest.mark.parametrize("access", [{}, {"auth": "open"}, {"auth": "open", "api_keys": ("k",)}])
def test_an_open_server_beyond_loopback_has_to_be_meant(access: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="insecure-no-auth"):
        bind(ServerSection(host="0.0.0.0", port=0), AccessSection(**access))


def test_commands_find_whose_state_the_server_at_a_port_has(tmp_path: Path) -> None:
    port = 100_000 + os.getpid()  # no server's
    folder = private_folder()
    try:
        assert data_dir_at(port) is None
        leave_word(folder, port, tmp_path / "state")
        assert data_dir_at(port) == tmp_path / "state"
        assert data_dir_at(port * 10) is None
    finally:
        shutil.rmtree(folder)
    assert data_dir_at(port) is None
