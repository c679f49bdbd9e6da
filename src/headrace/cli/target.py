"""Which server a client command talks to."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from headrace.errors import ConfigError

if TYPE_CHECKING:
    import httpx

    from headrace.config import Config


class ServerAway(Exception):
    """No answer, or not the answer of a server that we know; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    root: str
    """Scheme, address and path, without a slash or `/v1` at the end."""
    key: str | None = None
    own_certificate: Path | None = None
    """Of the configured server on this machine; nothing else is trusted in its place."""
    data_dir: Path | None = None
    """Of the server on this machine, unless a key was given. Who can read the pepper in it needs none to administer."""

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def is_local(self) -> bool:
        host = urlsplit(self.root).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def away(self, error: Exception) -> NoReturn:
        """Say in one message that the server can't be reached."""
        start = "; is it running? `headrace serve` starts it" if self.is_local else ""
        raise ServerAway(f"No server answers at {self.root}{start} ({str(error) or type(error).__name__}).") from error

    def client(self, *, timeout: float | None) -> httpx.Client:
        """A client for this server; a proxy from the environment is for others than this machine."""
        import httpx

        from headrace.tls import trust_own

        verify = trust_own(self.own_certificate) if self.own_certificate is not None else True
        return httpx.Client(
            verify=verify,
            headers=self.headers,
            timeout=httpx.Timeout(timeout, connect=10),
            trust_env=not self.is_local,
            event_hooks={"request": [self._show_pass]},
        )

    def administer(self, method: str, path: str, *, timeout: float | None) -> dict[str, Any]:
        """What the server says to an administrator's call of `path`. Raises `ServerAway`, with the server's own reason where it refuses."""
        import httpx

        try:
            with self.client(timeout=timeout) as client:
                answer = client.request(method, f"{self.root}{path}")
            said = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.away(error)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise ServerAway(f"What answers at {self.root} is not a Headrace server (HTTP {answer.status_code}).")
        if answer.status_code != 200:
            raise ServerAway(str(said.get("detail") or f"{self.root} answers {answer.status_code}."))
        return said

    def _show_pass(self, request: httpx.Request) -> None:
        """To this machine's server as its operator. Keys of the configuration administer nothing."""
        from headrace.policies.operator_pass import operator_pass

        if self.data_dir is None or not self.is_local or "/admin/" not in request.url.path:
            return
        from headrace.address import data_dir_at

        port = request.url.port or (443 if request.url.scheme == "https" else 80)
        data_dir = data_dir_at(port) or self.data_dir.expanduser()
        with contextlib.suppress(OSError):  # another user's: it takes a key, as the server will say
            request.headers["authorization"] = f"Bearer {operator_pass((data_dir / 'pepper').read_bytes(), time.time())}"


def target(url: str | None, key: str | None, config: Path | None = None) -> Target:
    """The server named by `--url`, or this machine's, as configured.

    The configured key goes to the configured server only, never to a URL that somebody gave. Raises `ConfigError`.
    """
    from headrace.cli.sources import load

    if url is not None:
        root = url if "://" in url else f"http://{url}"
        named = Target(root.rstrip("/").removesuffix("/v1"), key)
        return replace(named, data_dir=_data_dir(config)) if named.is_local and key is None else named
    loaded = load(file=config).config
    if loaded.server.port == 0:
        raise ConfigError("The configured port is 0, any free one; say with --url where the server is.")
    keys = loaded.access.api_keys
    return Target(
        local_root(loaded),
        key or (keys[0].get_secret_value() if keys else None),
        loaded.tls.tls_cert,
        loaded.store.data_dir if key is None else None,
    )


def _data_dir(config: Path | None) -> Path:
    from headrace.cli.sources import load
    from headrace.config import StoreSection

    with contextlib.suppress(ConfigError):  # a server that is named needs nothing configured here
        return load(file=config).config.store.data_dir
    return StoreSection().data_dir


def local_root(config: Config) -> str:
    """How this machine reaches the server that `config` describes."""
    host = config.server.host
    try:
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "[::1]"
        elif address.version == 6:
            host = f"[{host}]"
    except ValueError:
        pass
    scheme = "http" if config.tls.tls_cert is None else "https"
    return f"{scheme}://{host}:{config.server.port}"
