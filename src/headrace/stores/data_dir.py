"""The private folder of a server's lasting state, and the pepper in it."""

from __future__ import annotations

import hmac
import os
import secrets
import tempfile
from pathlib import Path

from headrace.config import StoreSection
from headrace.errors import ConfigError

PEPPER_BYTES = 32


def prepare_data_dir(store: StoreSection) -> Path:
    """The folder, made for this user alone if it isn't there. Raises `ConfigError`."""
    folder = store.data_dir.expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error
    return folder


def database_url(store: StoreSection) -> str:
    """The configured database, or the one in the data folder."""
    return store.database_url or f"sqlite:///{store.data_dir.expanduser().absolute()}/headrace.db"


def journal_folder(store: StoreSection) -> Path:
    """Where API processes keep what must outlive them: counters, and bills while the database is away."""
    return store.data_dir.expanduser().absolute() / "journal"


def owed_folder(store: StoreSection) -> Path:
    """Where it waits what limits in Redis are still to hear of processes that died."""
    return store.data_dir.expanduser().absolute() / "limits-owed"


def load_pepper(folder: Path) -> bytes:
    """The secret that keys are digested with, made on first use; of several starters all get the same one. Raises `ConfigError`."""
    path = folder / "pepper"
    try:
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            _make(path)
            found = path.read_bytes()
    except OSError as error:
        raise _unusable(path, error) from error
    if len(found) < PEPPER_BYTES:
        raise ConfigError(f"{path} is damaged: it has {len(found)} bytes, not {PEPPER_BYTES}. Put it back from a backup.")
    return found


def pepper_check(pepper: bytes) -> bytes:
    """Tells two peppers apart, and nothing else of them."""
    return hmac.digest(pepper, b"headrace pepper check", "sha256")


def _make(path: Path) -> None:
    """Complete before it has its name, and never over another starter's."""
    handle, name = tempfile.mkstemp(prefix=".pepper-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(PEPPER_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            Path(path).hardlink_to(name)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        Path(name).unlink()


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} can't be used: {error.strerror or error}. Set HEADRACE_DATA_DIR to a folder of the server's own.")
