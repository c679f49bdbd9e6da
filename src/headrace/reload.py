"""A new configuration for a server that runs: what may differ from the one in force, and whether it can be used at all."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from headrace.address import auth_at, check_strangers
from headrace.config import Config, fields
from headrace.errors import ConfigError
from headrace.fleet import Member, fleet
from headrace.lineup import check, names_of
from headrace.policies.filter_input import filter_steps
from headrace.policies.route import candidate
from headrace.stores.cache_open import second_level
from headrace.tls import check_tls
from headrace.tracing import check_tracing

FIXED_SECTIONS = frozenset({"model", "engine", "overload", "store"})
"""Sections that hold for as long as the server runs: its engines are made with them, and its supervisor."""
FIXED_FIELDS = frozenset({"host", "port", "ledger", "limits_url", "standby", "stall_timeout", "give_up_after", "memory_budget_gib"})
"""Likewise, of other sections."""


def changes(old: Config, new: Config) -> list[str]:
    """Flat names of the settings that differ."""
    return [field for field, section in fields().items() if getattr(getattr(old, section), field) != getattr(getattr(new, section), field)]


def fixed(field: str) -> bool:
    """Whether a setting can't be changed while the server runs."""
    return field in FIXED_FIELDS or fields()[field] in FIXED_SECTIONS


def added(old: Config, new: Config, members: Sequence[Member]) -> list[Member]:
    """Models that the new configuration has and the old one hasn't. Raises `ConfigError` and `ModelError`.

    What is there stays as it is: its workers may be running. What is different is another version.
    """
    for name, entry in old.fleet.models.items():
        if name not in new.fleet.models:
            raise ConfigError(f"models.{name} is served: start the server again to be without it.")
        if new.fleet.models[name] != entry:
            raise ConfigError(
                f'models.{name} is served as it was; for other values add a version of it, [models."NAME@VERSION"],'
                " or start the server again."
            )
    if new.fleet.models and not old.fleet.models:
        raise ConfigError("The server has to be started again to serve [models].")
    here = {member.files.name for member in members}
    return [member for member in fleet(new) if member.files.name not in here]


def usable(old: Config, new: Config, bound: socket.socket, members: Sequence[Member]) -> Config:
    """The new configuration as its processes get it; both are given as they were read. Blocks for moments.

    Raises `ConfigError`, and nothing has changed then.
    """
    refused = [field for field in changes(old, new) if fixed(field)]
    if refused:
        raise ConfigError(f"The server has to be started again for other values of {', '.join(refused)}.")
    check_strangers(new.server, new.access, bound.getsockname()[0])
    check_tls(new.tls)
    check_tracing(new.trace)
    if new.cache.response_cache == "on":
        second_level(new)
    filter_steps(new.filters)
    check(new)
    access = new.access.model_copy(update={"auth": auth_at(bound, new.access)})
    return _with_names(new, members).model_copy(update={"access": access})


def _with_names(config: Config, members: Sequence[Member]) -> Config:
    """Models by their names, as `lineup` does at the start; but only those that are served already."""
    names = names_of(members, config.fleet.aliases)

    def named(address: str, setting: str) -> str:
        if address not in names:
            raise ConfigError(f"{setting}: {address!r} is not served yet; for another model the server has to be started again.")
        return names[address]

    resilience = config.resilience
    chains = {
        named(name, "fallbacks"): tuple(named(entry, "fallbacks") if candidate(entry).kind == "model" else entry for entry in chain)
        for name, chain in resilience.fallbacks.items()
    }
    smaller = None if resilience.degrade_model is None else named(resilience.degrade_model, "degrade_model")
    return config.model_copy(update={"resilience": resilience.model_copy(update={"fallbacks": chains, "degrade_model": smaller})})
