"""The models that an API process serves, as the steps of the journey and the HTTP floor see them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

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

    @property
    def names(self) -> tuple[str, ...]:
        return (self.files.name, *self.files.aliases)

    @property
    def public_name(self) -> str:
        """The name that answers carry: the operator's alias if there is one."""
        return self.files.public_name


class ServedModels:
    """Models by name; the first is the default."""

    def __init__(self, models: list[ServedModel]) -> None:
        self._models = models
        self._by_name = {name: model for model in reversed(models) for name in model.names}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def default(self) -> ServedModel:
        return self._models[0]

    def find(self, name: str | None) -> ServedModel:
        """The model of that name, the default for None. Raises `ModelNotFound`, which names those that exist."""
        if name is None:
            return self.default
        found = self._by_name.get(name)
        if found is None:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise ModelNotFound(f"There is no model {shown!r} here; there is {', '.join(self._by_name)}.", param="model")
        return found
