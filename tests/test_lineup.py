from __future__ import annotations

import pytest
from pydantic import SecretStr, ValidationError

from headrace.cli.sources import load
from headrace.config import Config, ModelSection, ResilienceSection
from headrace.errors import ConfigError, ModelError
from headrace.lineup import lineup


def config(resilience: dict[str, object], **model: object) -> Config:
    return Config(model=ModelSection.model_validate({"model": "echo"} | model), resilience=ResilienceSection.model_validate(resilience))


def test_one_model_is_all_there_is_as_a_rule() -> None:
    named, members = lineup(config({}))
    assert [member.files.name for member in members] == ["echo"]
    assert named.resilience.fallbacks == {}


def test_fallbacks_are_served_once_and_called_by_their_names() -> None:
    chains = {"house": ("echo?pace=0.01", "http://127.0.0.1:9/v1", "cache", "canned: later"), "echo-2": ("echo", "house")}
    named, members = lineup(config({"fallbacks": chains, "degrade_queue": 9, "degrade_model": "echo?pace=0.01"}, name="house"))
    assert [(member.files.name, member.files.kind) for member in members] == [("echo", "echo"), ("echo-2", "echo"), ("remote", "remote")]
    assert named.resilience.fallbacks == {"house": ("echo-2", "remote", "cache", "canned: later"), "echo-2": ("echo", "echo")}
    assert named.resilience.degrade_model == "echo-2"
    assert members[1].files.aliases == (), "the name is the default model's"


def test_a_key_is_shown_to_one_upstream_only() -> None:
    chains = {"echo": ("http://127.0.0.1:9/v1", "http://127.0.0.1:10/v1")}
    _, members = lineup(config({"fallbacks": chains}, remote_api_key=SecretStr("secret"), remote_model="big"))
    assert [member.section.remote_api_key is None for member in members] == [False, False, True]
    assert [member.files.name for member in members] == ["echo", "big", "remote"]


def test_chains_of_models_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="no model 'ecco' here; there is echo"):
        lineup(config({"fallbacks": {"ecco": ("canned: x",)}}))
    with pytest.raises(ModelError):
        lineup(config({"fallbacks": {"echo": ("no-such-model",)}}))


@pytest.mark.parametrize("chain", [("",), ("canned:",), ("canned: x", "echo")])
def test_chains_that_lead_nowhere_are_refused(chain: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        ResilienceSection(fallbacks={"echo": chain})


def test_a_table_and_a_variable_say_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "headrace.toml").write_text('model = "echo"\n[fallbacks]\necho = ["cache", "canned: later"]\n')
    from_table = load(environ={}, folder=tmp_path)
    from_variable = load(environ={"HEADRACE_FALLBACKS": '{"echo": ["cache", "canned: later"]}'}, folder=tmp_path / "..")
    assert from_table.config.resilience.fallbacks == from_variable.config.resilience.fallbacks == {"echo": ("cache", "canned: later")}
    with pytest.raises(ConfigError, match="JSON"):
        load(environ={"HEADRACE_FALLBACKS": "echo=canned"}, folder=tmp_path)
    (tmp_path / "headrace.toml").write_text('[fallback]\necho = ["cache"]\n')
    with pytest.raises(ConfigError, match="fallback"):
        load(environ={}, folder=tmp_path)


def test_settings_that_would_change_nothing_are_refused() -> None:
    for settings in ({"degrade_queue": 3}, {"degrade_max_tokens": 3}, {"degrade_model": "echo"}):
        with pytest.raises(ConfigError, match="degrade_queue"):
            lineup(config(settings))
    cacheless = config({"fallbacks": {"echo": ("cache",)}})
    cacheless = cacheless.model_copy(update={"cache": cacheless.cache.model_copy(update={"response_cache": "off"})})
    with pytest.raises(ConfigError, match="response_cache"):
        lineup(cacheless)
