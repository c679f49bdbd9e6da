"""The address that HTTP is served on: who may be let in there, and taking hold of it before anything slow begins."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import Literal

from headrace.config import AccessSection, ServerSection
from headrace.errors import ConfigError

ENGINE_SOCKET = "engine"
"""Name of the engine's socket in a server's private folder."""
WHEREABOUTS = "whereabouts"
"""Name of the file there that says at which port the server is, and where its state is kept."""
_PREFIX = "headrace-"
_SO_ATTACH_FILTER = 26
_LONGEST_PATH = 100
"""Bytes; a unix socket's address has room for about 107."""


def bind(server: ServerSection, access: AccessSection) -> socket.socket:
    """A TCP socket bound to the configured address, not listening yet.

    Raises `ConfigError` if the address is open to others and nothing says who they are, or can't be bound.
    """
    family, address = _resolve(server.host, server.port)
    check_strangers(server, access, address[0])
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == "::":
            with contextlib.suppress(OSError):
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise cannot_bind(server, error) from error
    bound.set_inheritable(True)
    return bound


def check_strangers(server: ServerSection, access: AccessSection, address: str) -> None:
    """Raises `ConfigError` if the address, as numbers, is open to others and nothing says who they are."""
    if _is_loopback(address) or access.insecure_no_auth:
        return
    if access.auth == "open":
        raise ConfigError(
            f"{server.host} can be reached from other machines, and auth is open, so anyone could use this server. "
            "Set auth to keys, or bind to 127.0.0.1; or, if the network itself keeps strangers out, add --insecure-no-auth."
        )
    if access.auth is None and not access.api_keys:
        raise ConfigError(
            f"{server.host} can be reached from other machines, and no keys are configured, so anyone could use this server. "
            "Make keys with `headrace keys create` and add --auth keys, or set HEADRACE_API_KEYS to one or more keys, or bind to "
            "127.0.0.1; or, if the network itself keeps strangers out, add --insecure-no-auth."
        )


def auth_at(bound: socket.socket, access: AccessSection) -> Literal["open", "keys"]:
    """Whether callers at this address need keys: as configured, or else not on loopback, and beyond it unless that was waived."""
    if access.auth is not None:
        return access.auth
    return "open" if _is_loopback(bound.getsockname()[0]) or access.insecure_no_auth else "keys"


def cannot_bind(server: ServerSection, error: OSError) -> ConfigError:
    """What to do about an address that can't be had."""
    where = f"{server.host}:{server.port}"
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"{where} is in use by another program. Stop that, or choose another port with --port (0 takes a free one).")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"{where} may not be bound by this user; ports below 1024 often may not. Choose another with --port.")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"{server.host} is not an address of this machine. Use 127.0.0.1, or 0.0.0.0 for all addresses.")
    return ConfigError(f"{where} can't be bound: {error.strerror or error}.")


def url_of(bound: socket.socket, *, tls: bool = False) -> str:
    """Where a browser on this machine would find it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  (compared, not bound)
        host = "127.0.0.1"
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def private_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough for unix sockets in it."""
    for base in _bases():
        if len(os.fsencode(base)) + 40 <= _LONGEST_PATH and os.access(base, os.W_OK | os.X_OK):
            _sweep(Path(base))
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    raise ConfigError("There is no writable folder for the server's sockets; set TMPDIR to one with a short path.")


def _bases() -> list[str]:
    places = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")  # noqa: S108  (mkdtemp makes it private)
    return [base for base in dict.fromkeys(places) if base]


def leave_word(folder: Path, port: int, data_dir: Path) -> None:
    """For this user's own commands, in the server's private folder: whose state the server at that port has."""
    (folder / WHEREABOUTS).write_text(f"{port}\n{data_dir.expanduser().absolute()}", encoding="utf-8", errors="surrogateescape")


def data_dir_at(port: int) -> Path | None:
    """Where this user's server at that port keeps its state, if one is there."""
    for base in _bases():
        for path in Path(base).glob(f"{_PREFIX}*/{WHEREABOUTS}"):
            with contextlib.suppress(OSError):
                if path.parent.stat().st_uid == os.getuid():
                    said, _, data_dir = path.read_text(encoding="utf-8", errors="surrogateescape").partition("\n")
                    if said == str(port):
                        return Path(data_dir)
    return None


def _sweep(base: Path) -> None:
    """Remove folders of servers that were killed: their sockets are there, and nobody listens."""
    for path in base.glob(f"{_PREFIX}*/{ENGINE_SOCKET}"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if path.parent.stat().st_uid != os.getuid():
                continue
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                shutil.rmtree(path.parent, ignore_errors=True)


def listen_privately(path: Path) -> socket.socket:
    """A unix socket listening at `path`, for this user alone."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(128)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("true", ctypes.c_ubyte), ("false", ctypes.c_ubyte), ("k", ctypes.c_uint32))


def let_nobody_in(listening: socket.socket) -> bool:
    """Have the kernel drop requests for new connections, so that a socket can be emptied before it is closed; False where it can't.

    Closing a listening socket resets the connections in its queue. A client whose first packet is dropped sends it again after a
    second, finds the port closed, and knows that it was never served. Connections that are being made go on. A classic packet
    filter, as in Linux' socket(7); other systems have none.
    """
    load_flags, mask, is_syn, give = 0x30, 0x54, 0x15, 0x06
    program = (_Instruction * 5)(
        _Instruction(load_flags, 0, 0, 13),
        _Instruction(mask, 0, 0, 0x12),  # SYN and ACK
        _Instruction(is_syn, 0, 1, 0x02),
        _Instruction(give, 0, 0, 0),
        _Instruction(give, 0, 0, 0xFFFFFFFF),
    )
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(program)))
    except OSError:
        return False
    return True


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"The host {host!r} is not an address and can't be looked up: {error}.") from error
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]  # (host, port), and for IPv6 two numbers more


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
