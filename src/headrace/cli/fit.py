"""How much memory and disk a model will take, found out without loading or downloading it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from headrace.config import Config
from headrace.engine.processor import features, kv_element_bytes
from headrace.errors import ModelError
from headrace.fleet import QUANTIZED, WORKING
from headrace.models.openvino_folder import kv_elements


@dataclass(frozen=True, slots=True)
class Fit:
    """Sizes are bytes; 0 where nothing is needed or nothing is known."""

    name: str
    reason: str = ""
    """Why no memory is needed."""
    weights: int = 0
    kv_per_token: int = 0
    context: int = 0
    known_need: int = 0
    """What the catalog says that serving takes, for a model that isn't here."""
    to_write: int = 0
    """Disk space that the first start takes."""
    here: bool = False

    @property
    def least(self) -> int:
        """Without keys and values."""
        return self.weights + WORKING if self.weights else 0

    @property
    def needed(self) -> int:
        """With keys and values of one full context."""
        return max(self.known_need, self.least + self.kv_per_token * self.context)


def measure(config: Config) -> Fit:
    """The configured model's needs. Raises `ModelError` where its name means nothing."""
    fit = _measure(config)
    quantize = config.model.quantize
    return fit if quantize is None else dataclasses.replace(fit, weights=int(fit.weights * QUANTIZED[quantize]))


def _measure(config: Config) -> Fit:
    from headrace.models import catalog, superseded
    from headrace.models.address import Echo, Local, Remote, Repository, parse
    from headrace.models.engine_choice import transformers_settings
    from headrace.models.resolve import local_models

    section = config.model
    address = parse(section.model, section.hub)
    match address:
        case Echo():
            return Fit("echo", "needs no model", here=True)
        case Remote():
            return Fit(address.url, "runs elsewhere", here=True)
        case Local(path):
            return _local(path, section.context, deterministic=config.engine.deterministic)
        case Repository() | catalog.CatalogEntry():
            sources = {address.source, address.mirror} if isinstance(address, catalog.CatalogEntry) else {str(address)}
            name = section.model if isinstance(address, Repository) else address.name
            # A model may be there twice: converted, and as it came for the transformers engine.
            as_it_came = section.engine == "transformers" or bool(transformers_settings(section))
            here = local_models(section.cache_dir)
            here.sort(key=lambda model: not (Path(model.folder) / "openvino_model.bin").is_file())
            for model in here:
                converted = (Path(model.folder) / "openvino_model.bin").is_file()
                if not (as_it_came and converted) and (model.source in sources or model.name == name):
                    context = section.context or model.context_length
                    return _folder(Path(model.folder), name, context, deterministic=config.engine.deterministic)
            if isinstance(address, Repository):
                old = superseded.find(address.id)
                if old is not None and not section.trust_remote_code:
                    raise ModelError(old.advice)
                return Fit(name, "is not in the cache, so its size isn't known yet")
            # Downloaded, converted, and for a moment both.
            return Fit(name, weights=address.size, known_need=address.memory, to_write=4 * address.size)


def _local(path: Path, context: int | None, *, deterministic: bool) -> Fit:
    if path.is_dir() and (path / "openvino_model.bin").is_file():
        return _folder(path, path.name, context or 0, deterministic=deterministic)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    weights = sum(file.stat().st_size for file in files)
    return Fit(path.name, weights=weights, to_write=2 * weights, here=True)


def _as_stored(folder: Path, name: str, context: int) -> Fit:
    """For the transformers engine, whose own check says more."""
    return Fit(
        name,
        weights=sum(file.stat().st_size for kind in ("*.safetensors", "*.gguf") for file in folder.glob(kind)),
        context=context,
        here=True,
    )


def _folder(folder: Path, name: str, context: int, *, deterministic: bool) -> Fit:
    from headrace.models.card import read_card

    if not (folder / "openvino_model.bin").is_file():
        return _as_stored(folder, name, context or read_card(folder).context_length)
    weights = (folder / "openvino_model.bin").stat().st_size
    kv_per_token = int(kv_elements(folder) * kv_element_bytes(features(), deterministic=deterministic))
    return Fit(name, weights=weights, kv_per_token=kv_per_token, context=context or read_card(folder).context_length, here=True)
