"""Which models `headrace doctor` looks at: the configured one, or those of [models]."""

from __future__ import annotations

from headrace.config import Config
from headrace.fleet import Member, current_versions, fleet


def to_check(config: Config) -> list[tuple[str, Config]]:
    """Each model's label and the configuration as it is for that one; the label is empty where there is but one.

    Raises `ConfigError` and `ModelError` for sections that can't be meant.
    """
    members = fleet(config)
    if not members:
        return [("", config)]
    if "model" not in config.model.model_fields_set:
        found = members
    else:
        found = _called(config, members, config.model.model)
    if not found:
        return [("", config)]
    return [(member.files.name if len(found) > 1 else "", _of(config, member)) for member in found]


def _called(config: Config, members: list[Member], name: str) -> list[Member]:
    alias = config.fleet.aliases.get(name)
    if alias is not None:
        targets = [*([alias.to] if alias.to else alias.split), *([alias.shadow] if alias.shadow else ())]
        return [member for target in targets for member in _called(config, members, target)]
    id_ = current_versions(members).get(name, name)
    return [member for member in members if id_ in (member.files.name, *member.files.aliases)]


def _of(config: Config, member: Member) -> Config:
    given = member.entry.kv_cache_gib if member.entry is not None else None
    engine = config.engine if given is None else config.engine.model_copy(update={"kv_cache_gib": given})
    return config.model_copy(update={"model": member.section, "engine": engine})
