"""Which models a server serves: the configured one, and those that its fallbacks and its degrading name."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from headrace.config import Config, ModelEntry, ModelSection
from headrace.errors import ConfigError
from headrace.models.resolve import resolve
from headrace.policies.route import candidate
from headrace.types import ModelFiles


@dataclass(frozen=True, slots=True)
class Member:
    """A model to be served, with the part of the configuration that its worker may see."""

    files: ModelFiles
    section: ModelSection
    entry: ModelEntry | None = None
    """Its section in the configuration, where it is one of [models]."""
    family: str = ""
    """The name that it shares with its other versions."""
    version: str = ""


def lineup(config: Config) -> tuple[Config, list[Member]]:
    """The models, the default first, all of them on this machine; and the configuration with their names in place of addresses.

    Blocks, for minutes if it downloads. Raises `ModelError` and `ConfigError`.
    """
    return _Lineup(config).all()


def check(config: Config) -> None:
    """Raises `ConfigError` for settings that would change nothing."""
    resilience = config.resilience
    degrades = resilience.degrade_max_tokens is not None or resilience.degrade_model is not None
    if resilience.degrade_queue is None and degrades:
        raise ConfigError("degrade_max_tokens and degrade_model need degrade_queue: the queue from which answers are degraded.")
    if resilience.degrade_queue is not None and not degrades:
        raise ConfigError("degrade_queue needs degrade_max_tokens, degrade_model or both: how answers are degraded.")
    if config.cache.response_cache == "off" and any("cache" in chain for chain in resilience.fallbacks.values()):
        raise ConfigError("fallbacks: `cache` needs response_cache = on.")


_OF_ONE_MODEL = {"name": None, "context": None, "engine": "auto", "quantize": None, "dtype": "auto", "device": "auto"}
"""What is said of the default model, and not of those that stand in for it."""


class _Lineup:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._members: list[Member] = []
        self._names: dict[str, str] = {}
        """What a model may be called, or is addressed by: its name."""
        self._key_given = False

    def all(self) -> tuple[Config, list[Member]]:
        resilience = self._config.resilience
        check(self._config)
        self._add(self._config.model)
        chains = {name: tuple(self._named(entry) for entry in chain) for name, chain in resilience.fallbacks.items()}
        smaller = None if resilience.degrade_model is None else self._model(resilience.degrade_model)
        for name in chains:
            if name not in self._names:
                served = ", ".join(called for member in self._members for called in (member.files.name, *member.files.aliases))
                raise ConfigError(f"fallbacks: there is no model {name!r} here; there is {served}.")
        named = resilience.model_copy(update={"fallbacks": chains, "degrade_model": smaller})
        return self._config.model_copy(update={"resilience": named}), self._members

    def _named(self, entry: str) -> str:
        return self._model(entry) if candidate(entry).kind == "model" else entry

    def _model(self, address: str) -> str:
        """The name of the model of that name or address."""
        known = self._names.get(address)
        if known is None:
            known = self._add(self._config.model.model_copy(update={"model": address, **_OF_ONE_MODEL}))
        return known

    def _add(self, section: ModelSection) -> str:
        if self._key_given:
            # The key is for one server, and no other is to see it.
            section = section.model_copy(update={"remote_api_key": None, "remote_model": None})
        files = resolve(section)
        self._key_given = self._key_given or files.kind == "remote"
        name, number = files.name, 1
        while name in self._names:
            number += 1
            name = f"{files.name}-{number}"
        files = msgspec.structs.replace(files, name=name)
        self._members.append(Member(files, section))
        for called in (name, *files.aliases, section.model):
            self._names.setdefault(called, name)
        return name
