"""Brings a hub repository's files into the cache folder: all of them, checked, or none that anybody sees."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from headrace.models.address import Repository
from headrace.models.cache import Cache, link_or_copy, safe_path, sha256
from headrace.models.card import ModelCard, write_card
from headrace.models.download import RemoteFile, download
from headrace.models.hubs import hub_client
from headrace.models.progress import Progress
from headrace.models.repository_files import choose


def fetch_repository(
    repository: Repository,
    name: str,
    destination: Path,
    cache: Cache,
    progress: Progress,
    *,
    trust_remote_code: bool,
    prefer_safetensors: bool = False,
) -> None:
    """Land the files in the folder `destination`, with a `headrace.json` that says where they are from. Call it under the model's lock.

    Raises `ModelError`. Files that were fetched completely before an interruption aren't fetched again.
    """
    hub = hub_client(repository)
    with hub.connection as connection:
        listing = hub.list(repository)
        choice = choose(
            listing.files,
            repository.select,
            trust_remote_code=trust_remote_code,
            where=str(repository),
            prefer_safetensors=prefer_safetensors,
        )
        # Another revision's leftovers must not mix with this one's.
        partial = cache.partial(destination.name) / safe_path(listing.revision)
        names = {file: safe_path(PurePosixPath(file.path).name if choice.kind == "gguf" else file.path) for file in choice.files}
        missing = [file for file, path in names.items() if not _have(partial / path, file)]
        size = sum(file.size for file in missing)
        factor = 3 if choice.kind == "gguf" else 2
        cache.need_space(factor * size, f"Downloading {name}")
        hashes: dict[str, str] = {}
        for file, path in names.items():
            target = partial / path
            if file in missing:
                with progress.bytes(f"Downloading {path}", file.size) as advance:
                    download(connection, file, target, advance)
            hashes[str(path)] = file.sha256.lower() or sha256(target)
    with cache.landing(destination) as work:
        for path in names.values():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(partial / path, work / path)
        write_card(work, ModelCard(name=name, source=str(repository), revision=listing.revision, hashes=hashes))
    cache.clear_partial(destination.name)


def _have(path: Path, file: RemoteFile) -> bool:
    # A file gets its name only after its check.
    return path.is_file() and path.stat().st_size == file.size
