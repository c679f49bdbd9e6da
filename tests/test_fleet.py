"""Models of [models.NAME]: names, versions, defaults, memory; and likeness of answers."""

from __future__ import annotations

import pytest

from headrace.config import AliasEntry, Config, FleetSection, GoldenPrompt, ModelEntry, ModelSection
from headrace.errors import ConfigError, ModelNotFound
from headrace.fleet import WORKING_ECHO, current_versions, fleet, needs
from headrace.golden import drift, likeness
from headrace.lineup import lineup
from headrace.served import ServedModel, ServedModels


def config(models: dict[str, ModelEntry], aliases: dict[str, AliasEntry] | None = None, **section: object) -> Config:
    given = ModelSection.model_validate(section)
    return Config(model=given, fleet=FleetSection(models=models, aliases=aliases or {}))


CHAT = {
    "chat": ModelEntry(model="echo?says=one", aliases=("talk",), temperature=0.5, pinned=True),
    "chat@2": ModelEntry(model="echo?says=two"),
    "chat@3": ModelEntry(temperature=0.9),
    "other@a": ModelEntry(model="echo?pace=0.5"),
}


def served(made: Config) -> ServedModels:
    members = fleet(made)
    models = [ServedModel(each.files, engine=None, family=each.family, entry=each.entry) for each in members]  # type: ignore[arg-type]
    return ServedModels(models, current=current_versions(members), aliases=made.fleet.aliases)


def test_versions_have_what_they_dont_say_from_their_family() -> None:
    members = {member.files.name: member for member in fleet(config(CHAT))}
    assert set(members) == {"chat@1", "chat@2", "chat@3", "other@a"}
    third = members["chat@3"].entry
    assert third is not None
    assert (third.model, third.temperature, third.pinned, third.aliases) == ("echo?says=one", 0.9, False, ())
    assert current_versions(members.values()) == {"chat": "chat@1", "other": "other@a"}


def test_names_are_found_by_version_family_and_alias_and_follow_promotions() -> None:
    aliases = {"canary": AliasEntry(split={"chat@1": 3, "chat@2": 1}), "fixed": AliasEntry(to="chat@1", shadow="chat@2")}
    models = served(config(CHAT, aliases))
    assert [models.find(name).files.name for name in (None, "chat", "talk", "fixed", "canary", "chat@3")] == ["chat@1"] * 5 + ["chat@3"]
    models.promote("chat", "chat@2")
    assert [models.find(name).files.name for name in (None, "chat", "talk", "fixed", "chat@1")] == ["chat@2"] * 3 + ["chat@1"] * 2
    shadow = models.shadow_of("fixed")
    assert shadow is not None
    assert shadow[0].files.name == "chat@2"
    with pytest.raises(ModelNotFound, match="canary"):
        models.find("nope")


def test_a_split_keeps_callers_where_they_are_and_keeps_to_its_weights() -> None:
    models = served(config(CHAT, {"canary": AliasEntry(split={"chat@1": 3, "chat@2": 1})}))
    chosen = [models.choose("canary", b"%d" % caller).files.name for caller in range(2000)]
    assert chosen == [models.choose("canary", b"%d" % caller).files.name for caller in range(2000)]
    assert 0.2 < chosen.count("chat@2") / len(chosen) < 0.3


def test_the_first_section_is_the_default_unless_a_model_is_named() -> None:
    assert lineup(config(CHAT))[1][0].files.name == "chat@1"
    assert lineup(config(CHAT, model="other"))[1][0].files.name == "other@a"
    members = lineup(config(CHAT, model="echo?pace=1"))[1]
    assert (members[0].files.name, members[0].family, len(members)) == ("echo", "", 5)


@pytest.mark.parametrize(
    ("models", "aliases", "said"),
    [
        ({"a b": ModelEntry(model="echo")}, {}, "no name for a model"),
        ({"a@2": ModelEntry()}, {}, "doesn't say"),
        ({"a": ModelEntry(model="echo", version="2"), "a@2": ModelEntry()}, {}, "twice"),
        ({"a": ModelEntry(model="echo", revision="main")}, {}, "revision"),
        ({"a": ModelEntry(model="echo", aliases=("b",)), "b": ModelEntry(model="echo")}, {}, "'b' is a model already"),
        ({"a": ModelEntry(model="echo")}, {"a": AliasEntry(to="a@1")}, "'a' is a model already"),
    ],
)
def test_what_cant_be_meant_is_refused(models: dict[str, ModelEntry], aliases: dict[str, AliasEntry], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fleet(config(models, aliases))


def test_a_need_counts_every_replica() -> None:
    made = config({"a": ModelEntry(model="echo?memory=10", replicas=3), "b": ModelEntry(model="echo", memory_gib=2)})
    a, b = fleet(made)
    assert needs(made, a, a.files, {}) == {"ram": 3 * (WORKING_ECHO + 10 * 2**20)}
    assert needs(made, b, b.files, {}) == {"ram": 2 * 2**30}


def test_likeness_is_of_words_in_their_order() -> None:
    assert likeness("The sea is blue", "the sea is  blue") == 1
    assert likeness("the sea is blue", "the sea is red") == pytest.approx(0.75)
    assert likeness("", "something") == 0
    prompts = (GoldenPrompt(prompt="2+2=", expect="4"), GoldenPrompt(prompt="Hello"))
    assert drift(prompts, ["It is 4.", "a b"], ["?", "a b"]) == (1.0, drift(prompts, ["It is 4.", "a b"], ["?", "a b"])[1])
    mean, why = drift(prompts, ["five", "a b"], None)
    assert (mean, "'2+2='" in why) == (0, True)
