"""The models that an API process serves, as the steps of the journey and the HTTP floor see them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from headrace.config import AliasEntry, ModelEntry
from headrace.errors import ModelNotFound
from headrace.ports import ChatTemplate, Engine, Tokenizer
from headrace.types import CircuitState, EngineCard, EngineStatus, ModelFiles


@dataclass(slots=True)
class ServedModel:
    """One model: its files, its words (tokenizer and template) and its engine.

    `tokenizer` and `template` are None for an engine that templates by itself (capability `messages`), and
    `template` alone for a base model.
    """

    files: ModelFiles
    engine: Engine
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    card: EngineCard | None = None
    """Set once the engine is ready for the first time; it stays when the engine is restarted."""
    status: EngineStatus = field(default_factory=EngineStatus)
    circuit: CircuitState = "closed"
    """Of the engine's circuit breaker."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time, for `/v1/models`."""
    family: str = ""
    """The name that it shares with other versions of it."""
    entry: ModelEntry | None = None
    """Its section in the configuration, where it is one of several models."""
    bring: Callable[[], Awaitable[None]] | None = None
    """Until its words are here: has it fetched, if need be, and loads them. Raises `ModelNotLoaded` and `ModelTooLarge`."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.files.name, *self.files.aliases)

    @property
    def public_name(self) -> str:
        """The name that answers carry: the operator's alias if there is one."""
        return self.files.public_name


class ServedModels:
    """Models by name; the first is the default.

    `current`: by family, the version that its bare name stands for, which changes when a version is promoted. `aliases` as configured.
    """

    def __init__(
        self, models: list[ServedModel], *, current: Mapping[str, str] | None = None, aliases: Mapping[str, AliasEntry] | None = None
    ) -> None:
        self._models = models
        self._by_name = {name: model for model in reversed(models) for name in model.names}
        self._by_id = {model.files.name: model for model in models}
        self._current = dict(current or {})
        self._aliases = dict(aliases or {})
        self._default_family = models[0].family if models else ""

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def default(self) -> ServedModel:
        return self._current_of(self._default_family) or self._models[0]

    def promote(self, family: str, version: str) -> None:
        """The family's bare name stands for that model from now on."""
        if version in self._by_id:
            self._current[family] = version

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, the default for None. Of an alias that splits, the heaviest part.

        Raises `ModelNotFound`, which names those that exist.
        """
        if name is None:
            return self.default
        found = self._by_id.get(name) or self._current_of(name)
        if found is None and (alias := self._aliases.get(name)) is not None:
            found = self.find(alias.to or max(alias.split, key=lambda part: alias.split[part]))
        if found is None and (found := self._by_name.get(name)) is not None and found.family in found.names:
            # A further name of the family, not of one version.
            found = self._current_of(found.family) or found
        if found is None:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise ModelNotFound(f"There is no model {shown!r} here; there is {', '.join(self.names())}.", param="model")
        return found

    def choose(self, name: str | None, caller: bytes) -> ServedModel:
        """The model that a caller's request for that name goes to: where an alias splits, always the same for a caller."""
        alias = self._aliases.get(name) if name is not None else None
        if alias is None or not alias.split:
            return self.find(name)
        assert name is not None
        digest = blake2b(caller, digest_size=8, key=name.encode()[:64]).digest()
        point = int.from_bytes(digest) / 2**64 * sum(alias.split.values())
        for part, weight in alias.split.items():
            if point < weight:
                return self.find(part)
            point -= weight
        return self.find(name)

    def shadow_of(self, name: str | None) -> tuple[ServedModel, float] | None:
        """Which model is to get copies of requests for that name, and of what share of them."""
        alias = self._aliases.get(name) if name is not None else None
        return None if alias is None or alias.shadow is None else (self.find(alias.shadow), alias.shadow_share)

    def names(self) -> dict[str, ServedModel]:
        """Every name there is, and what it stands for at present."""
        names = [*self._by_name, *self._current, *self._aliases]
        return {name: self.find(name) for name in names}

    @property
    def several(self) -> bool:
        """Whether a name may stand for now this model, now that one."""
        return bool(self._current or self._aliases)

    def _current_of(self, family: str) -> ServedModel | None:
        return self._by_id.get(self._current.get(family, ""))
