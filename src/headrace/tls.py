"""HTTPS: the server's certificate, read again when its files change, and what a client on the same machine trusts."""

from __future__ import annotations

import os
import ssl
import tempfile
from pathlib import Path

from headrace.config import TlsSection
from headrace.errors import ConfigError

Stamp = tuple[tuple[int, int, int], ...]


class ServerTls:
    """A context for uvicorn. Connections keep the certificate that they began with; new ones get the newest.

    Raises `ConfigError` if the files can't be used.
    """

    def __init__(self, tls: TlsSection) -> None:
        if tls.tls_cert is None:
            raise ConfigError("tls_key and tls_client_ca need tls_cert, the server's certificate.")
        self._cert = tls.tls_cert.expanduser()
        self._key = tls.tls_key.expanduser() if tls.tls_key is not None else None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.set_alpn_protocols(["http/1.1"])
        if tls.tls_client_ca is not None:
            try:
                self.context.load_verify_locations(tls.tls_client_ca.expanduser())
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"tls_client_ca {tls.tls_client_ca} can't be used: {error}.") from error
            self.context.verify_mode = ssl.CERT_REQUIRED
        self._stamp = self._seen()
        self._load()

    def reload(self) -> bool:
        """Take over files that have changed; True if they were.

        Raises `ConfigError` where they can't be used, such as half-way through being replaced; the old certificate goes on.
        """
        stamp = self._seen()
        if stamp == self._stamp:
            return False
        self._load()
        self._stamp = stamp
        return True

    def _seen(self) -> Stamp:
        try:
            stats = [path.stat() for path in (self._cert, self._key) if path is not None]
        except OSError as error:
            raise ConfigError(f"The certificate can't be read: {error.filename}: {error.strerror}.") from error
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def _load(self) -> None:
        # Certificate and key as one file that nobody replaces meanwhile: a pair that fits here fits in the live context too.
        try:
            pair = self._cert.read_bytes() + b"\n" + (self._key.read_bytes() if self._key is not None else b"")
            with tempfile.TemporaryDirectory(prefix="headrace-tls-") as folder:  # mode 0700
                path = Path(folder) / "pair.pem"
                path.touch(mode=0o600)
                path.write_bytes(pair)
                for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
                    context.load_cert_chain(path, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else error
            named = f"{self._cert} and {self._key}" if self._key is not None else f"{self._cert}"
            raise ConfigError(f"{named} can't be used as certificate and key: {reason}.") from error


def _no_password() -> str:
    raise ValueError("the key is encrypted, and a server can't ask for its password")


def check_tls(tls: TlsSection) -> bool:
    """Whether HTTPS is on. Raises `ConfigError` if it can't work."""
    if tls.tls_cert is None and tls.tls_key is None and tls.tls_client_ca is None:
        return False
    ServerTls(tls)
    return True


def trust_own(cert: Path) -> ssl.SSLContext:
    """For a client on the server's own machine: it trusts exactly this certificate, whatever name it has. Raises `ConfigError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(os.fspath(cert.expanduser()))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert {cert} can't be used: {error}.") from error
    return context
