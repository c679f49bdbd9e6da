"""What a model's name means: an echo, a URL, a catalog entry, a path, or a repository on a hub."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from headrace.errors import ModelError
from headrace.models import catalog, superseded

Hub = Literal["huggingface", "modelscope"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,99}){0,3}")
_SELECTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_PREFIXES: dict[str, Hub] = {"hf": "huggingface", "ms": "modelscope"}


@dataclass(frozen=True, slots=True)
class Echo:
    options: dict[str, str]


@dataclass(frozen=True, slots=True)
class Remote:
    url: str
    options: dict[str, str]


@dataclass(frozen=True, slots=True)
class Local:
    path: Path


@dataclass(frozen=True, slots=True)
class Repository:
    """`hf:OWNER/NAME[@REVISION][:FILE-OR-QUANTIZATION]`, checked: none of the parts can lead anywhere else."""

    hub: Hub
    id: str
    revision: str | None = None
    """None: the hub's own main branch."""
    select: str | None = None
    """A GGUF file's name, or a quantization such as `Q4_K_M`."""

    def __str__(self) -> str:
        prefix = "hf" if self.hub == "huggingface" else "ms"
        return f"{prefix}:{self.id}" + (f"@{self.revision}" if self.revision else "") + (f":{self.select}" if self.select else "")


Address = Echo | Remote | Local | Repository | catalog.CatalogEntry


def parse(text: str, hub: Hub) -> Address:
    """Raises `ModelError` that names what could have been meant. Looks at the disk, never at the network."""
    if not text or len(text) > 4096 or "\0" in text or not text.isprintable():
        raise ModelError("The model's name is empty, too long or holds characters that can't be printed.")
    if text == "echo" or text.startswith("echo?"):
        return Echo(_options(text.partition("?")[2], text))
    if text.startswith(("http://", "https://")):
        return _remote(text)
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PREFIXES:
        return _repository(rest, _PREFIXES[prefix], text)
    entry = catalog.find(text)
    if entry is not None:
        return entry
    path = Path(text).expanduser()
    if _exists(path):
        return Local(path)
    if text.startswith((".", "/", "~")) or text.endswith(".gguf"):
        raise ModelError(f"There is no file or folder {text}. {_hint(text)}")
    if "/" in text:
        return _repository(text, hub, text)
    raise ModelError(f"There is no model {text!r}. {_hint(text)}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _hint(text: str) -> str:
    old = superseded.find(Path(text).name)
    if old is not None:
        return old.advice
    names = [entry.name for entry in catalog.entries()]
    near = difflib.get_close_matches(text.lower(), names, n=3)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"The catalog has {', '.join(names)}; a path, hf:OWNER/NAME and ms:OWNER/NAME are understood too."


def _options(query: str, text: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) != len(pairs):
        raise ModelError(f"{text!r} names an option twice.")
    return options


def _remote(text: str) -> Remote:
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 (it raises for a bad port)
    except ValueError as error:
        raise ModelError(f"{text!r} is not a URL that can be called ({error}).") from None
    if not parts.hostname:
        raise ModelError(f"{text!r} is not a URL that can be called: it names no host.")
    if parts.username or parts.password:
        raise ModelError("Put the remote engine's key into HEADRACE_REMOTE_API_KEY, not into its URL.")
    return Remote(parts._replace(query="", fragment="").geturl().rstrip("/"), _options(parts.query, text))


def _repository(rest: str, hub: Hub, text: str) -> Repository:
    head, _, select = rest.partition(":")
    name, at, revision = head.partition("@")
    bad = (
        not _REPOSITORY.fullmatch(name)
        or (at and not _REVISION.fullmatch(revision))
        or (":" in rest and not _SELECTION.fullmatch(select))
        or ".." in rest
    )
    if bad:
        raise ModelError(
            f"{text[:120]!r} is not a model's address. A repository is OWNER/NAME, hf:OWNER/NAME or ms:OWNER/NAME, "
            f"with @REVISION and, for GGUF, :FILE.gguf or :Q4_K_M after it. {_hint(text[:120])}"
        )
    return Repository(hub, name, revision or None, select or None)
