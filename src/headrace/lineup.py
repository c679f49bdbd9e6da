"""Which models a server serves: the configured one, and those that its fallbacks and its degrading name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import msgspec

from headrace.config import Config, ModelSection
from headrace.errors import ConfigError
from headrace.fleet import Member, current_versions, fetched, fleet
from headrace.models.resolve import UNNAMED, resolve
from headrace.models.upstream_name import named_by_upstream
from headrace.policies.route import candidate


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


def names_of(members: Iterable[Member], aliases: Iterable[str] = ()) -> dict[str, str]:
    """What models may be called in the configuration, and what API processes know that name as: one of a family stays what it is,
    because what it stands for changes."""
    names: dict[str, str] = {alias: alias for alias in aliases}
    for member in members:
        for called in (member.files.name, *member.files.aliases, member.section.model):
            names.setdefault(called, called if member.family and called in member.files.aliases else member.files.name)
        if member.family:
            names[member.family] = member.family
    return names


class _Lineup:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._members: list[Member] = []
        self._names: dict[str, str] = {}
        """What a model may be called, or is addressed by: its name."""
        self._key_given = False
        """The key of `remote_api_key` is taken."""

    def all(self) -> tuple[Config, list[Member]]:
        resilience = self._config.resilience
        check(self._config)
        self._take_fleet()
        chains = {name: tuple(self._named(entry) for entry in chain) for name, chain in resilience.fallbacks.items()}
        smaller = None if resilience.degrade_model is None else self._model(resilience.degrade_model)
        for name in chains:
            if name not in self._names:
                served = ", ".join(called for member in self._members for called in (member.files.name, *member.files.aliases))
                raise ConfigError(f"fallbacks: there is no model {name!r} here; there is {served}.")
        named = resilience.model_copy(update={"fallbacks": chains, "degrade_model": smaller})
        return self._config.model_copy(update={"resilience": named}), self._members

    def _take_fleet(self) -> None:
        """The default model and those of [models]: of these the first, if no other is configured."""
        section, members = self._config.model, list(fleet(self._config))
        self._members = members
        self._names = names_of(members, self._config.fleet.aliases)
        default = None
        if members and "model" not in section.model_fields_set:
            default = members[0]
        elif members and section.model in self._names:
            name = current_versions(members).get(section.model, self._names[section.model])
            default = next((each for each in members if name in (each.files.name, *each.files.aliases)), None)
            if default is None:
                raise ConfigError(f"model: {section.model} is no model, but an alias for several; the default is one model.")
        if default is None:
            self._add(section, default=True)
            default = members[-1]
            for name in (default.files.name, *default.files.aliases):
                self._names[name] = default.files.name
        members.remove(default)
        if default.files.pending:
            default = dataclasses.replace(default, files=fetched(default))
        members.insert(0, default)

    def _named(self, entry: str) -> str:
        return self._model(entry) if candidate(entry).kind == "model" else entry

    def _model(self, address: str) -> str:
        """The name of the model of that name or address."""
        known = self._names.get(address)
        if known is None:
            known = self._add(self._config.model.model_copy(update={"model": address, **_OF_ONE_MODEL}))
        return known

    def _add(self, section: ModelSection, *, default: bool = False) -> str:
        if self._key_given:
            # The key is for one server, and no other is to see it.
            section = section.model_copy(update={"remote_api_key": None, "remote_model": None})
        files = resolve(section)
        if default and files.kind == "remote" and files.name == UNNAMED and section.name is None:
            key = section.remote_api_key
            files = named_by_upstream(files, None if key is None else key.get_secret_value())
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
