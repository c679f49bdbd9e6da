"""The two hubs' protocols: what a repository holds, at which revision, and where each file is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import msgspec

from headrace.errors import ModelError
from headrace.models.address import Repository
from headrace.models.download import TIMEOUT, RemoteFile

if TYPE_CHECKING:
    import httpx

_MOST_FILES = 10_000
_LONGEST_LISTING = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one moment. `revision` is a commit where the hub tells it."""

    revision: str
    files: tuple[RemoteFile, ...]


class HubClient(Protocol):
    """A hub: list a repository, and hold the connection its files are fetched over."""

    @property
    def connection(self) -> httpx.Client: ...
    def list(self, repository: Repository) -> Listing:
        """Raises `ModelError` where there is no such repository or it can't be read."""
        ...


def hub_client(repository: Repository) -> HubClient:
    """The hub's client, with its own endpoint, mirror and token from the environment, as the hubs' own tools name them."""
    if repository.hub == "huggingface":
        return HuggingFace(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", os.environ.get("HF_TOKEN"))
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "https://www.modelscope.cn"
    return ModelScope(endpoint if "://" in endpoint else f"https://{endpoint}", os.environ.get("MODELSCOPE_API_TOKEN"))


def _connection(token: str | None) -> httpx.Client:
    import httpx

    headers = {"User-Agent": "headrace"}
    if token:
        # httpx drops it when a redirect leads to another host.
        headers["Authorization"] = f"Bearer {token}"
    return httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=headers)


class HuggingFace:
    """https://huggingface.co/docs/hub/api"""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self.connection = _connection(token)

    def list(self, repository: Repository) -> Listing:
        revision = quote(repository.revision or "main", safe="")
        answer = _get_json(self.connection, f"{self._endpoint}/api/models/{repository.id}/revision/{revision}?blobs=true", repository)
        commit = answer.get("sha")
        siblings = answer.get("siblings")
        if not isinstance(siblings, list) or not isinstance(commit, str) or not commit.isalnum():
            raise ModelError(f"{repository}: the hub's answer isn't understood. Is HF_ENDPOINT a mirror of the whole API?")
        files = []
        for item in siblings[:_MOST_FILES]:
            name = str(item.get("rfilename", ""))
            large = item.get("lfs") or {}
            size = item.get("size") if item.get("size") is not None else large.get("size")
            if not name or not isinstance(size, int):
                continue
            url = f"{self._endpoint}/{repository.id}/resolve/{commit}/{quote(name)}"
            files.append(RemoteFile(name, size, url, str(large.get("sha256") or ""), "" if large else str(item.get("blobId") or "")))
        return Listing(commit, tuple(files))


class ModelScope:
    """https://www.modelscope.cn/docs (the API that its own client uses)"""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self.connection = _connection(token)

    def list(self, repository: Repository) -> Listing:
        revision = repository.revision or "master"
        base = f"{self._endpoint}/api/v1/models/{repository.id}/repo"
        answer = _get_json(self.connection, f"{base}/files?Revision={quote(revision, safe='')}&Recursive=true", repository)
        data = answer.get("Data")
        listed = data.get("Files") if isinstance(data, dict) else None
        if not isinstance(listed, list):
            raise ModelError(f"{repository}: ModelScope says {str(answer.get('Message'))[:200]!r}. Is the name right?")
        files = []
        for item in listed[:_MOST_FILES]:
            name, size = str(item.get("Path", "")), item.get("Size")
            if item.get("Type") == "tree" or not name or not isinstance(size, int):
                continue
            url = f"{base}?Revision={quote(revision, safe='')}&FilePath={quote(name, safe='')}"
            files.append(RemoteFile(name, size, url, str(item.get("Sha256") or "")))
        return Listing(revision, tuple(files))


def _get_json(connection: httpx.Client, url: str, repository: Repository) -> dict[str, Any]:
    import httpx

    try:
        with connection.stream("GET", url) as response:
            status = response.status_code
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _LONGEST_LISTING:
                    raise ModelError(f"{repository}: the hub's answer is longer than {_LONGEST_LISTING >> 20} MiB.")
    except httpx.HTTPError as error:
        raise ModelError(
            f"{repository}: the hub can't be reached ({error or type(error).__name__}). Check the network, set HF_ENDPOINT to a mirror, "
            "or take the model from the other hub (hf: or ms:)."
        ) from None
    if status in (401, 403):
        raise ModelError(
            f"{repository}: the hub answered {status}. There is no such model, or it is private or its licence isn't accepted yet: "
            "check the name, accept the licence on the hub's page, and set HF_TOKEN (or MODELSCOPE_API_TOKEN)."
        )
    if status == 404:
        raise ModelError(f"{repository}: the hub has no such model or revision. Check the name, or try the other hub (hf: or ms:).")
    if status != 200:
        raise ModelError(f"{repository}: the hub answered {status}. Try again later, or from the other hub.")
    try:
        answer = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        answer = None
    if not isinstance(answer, dict):
        raise ModelError(f"{repository}: what answered is not the hub's API. Check HF_ENDPOINT and any proxy.")
    return answer
