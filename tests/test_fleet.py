"""Models of [models.NAME]: names, versions, defaults, memory; and likeness of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.config import AliasEntry, Config, FleetSection, GoldenPrompt, ModelEntry, ModelSection
from headrace.errors import ConfigError, ModelNotFound
from headrace.fleet import WORKING_ECHO, WORKING_TORCH, arithmetic, current_versions, fetched, fleet, kv_bytes, needs
from headrace.golden import drift, likeness
from headrace.lineup import lineup
from headrace.served import ServedModel, ServedModels
from headrace.types import ModelFiles
from headrace.upgrades import remembered


def config(models: dict[str, ModelEntry], aliases: dict[str, AliasEntry] | None = None, **section: object) -> Config:
    given = ModelSection.model_validate(section)
    return Config(model=given, fleet=FleetSection(models=models, aliases=aliases or {}))


CHAT = {
    "chat": ModelEntry(model="echo?says=one", aliases=("talk",), temperature=0.5, pinned=True),
    "chat@2": ModelEntry(model="echo?says=two"),
    "chat@3": ModelEntry(temperature=0.9),
    "other@a": ModelEntry(model="echo?pace=0.5"),
}


@pytest.mark.parametrize("keep_alive", ["5m", 0])
def test_what_is_pinned_has_no_time_to_leave(keep_alive: object) -> None:
    with pytest.raises(ValueError, match="set one of them"):
        ModelEntry.model_validate({"model": "echo", "pinned": True, "keep_alive": keep_alive})
    (_, stays) = fleet(config({"m": ModelEntry(model="echo", keep_alive=5), "m@2": ModelEntry(pinned=True)}))
    assert stays.entry is not None
    assert (stays.entry.pinned, stays.entry.keep_alive) == (True, None)


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
        ({"a": ModelEntry(model="echo")}, {"x": AliasEntry(to="y"), "y": AliasEntry(to="x")}, "'y' is an alias itself; say which model: a"),
        ({"a": ModelEntry(model="echo", aliases=("b",))}, {"x": AliasEntry(to="b")}, "'b' is an alias itself"),
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


def tiny(folder: Path, context: int) -> None:
    """Of a transformers model, what memory depends on: 4 KiB of keys and values a token in 16 bits."""
    folder.mkdir()
    settings = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": context,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").write_bytes(bytes(1000))


@pytest.mark.parametrize(("context", "expected"), [(2**17, 2**12 * (2**17 + 32)), (16, 64 * 2**12 * (16 + 32)), (2**14, 2**28)])
def test_a_whole_context_finds_room_and_no_more_is_taken_than_can_be_used(tmp_path: Path, context: int, expected: int) -> None:
    tiny(tmp_path / "m", context)
    made = config({"a": ModelEntry(model=str(tmp_path / "m"), dtype="bfloat16", replicas=2), "b": ModelEntry(model="echo")})
    member = fleet(made)[0]
    files = ModelFiles(name="a@1", kind="transformers", folder=str(tmp_path / "m"), context_length=context)
    pools = {"ram": 2**28}
    assert kv_bytes(made, member, files, pools) == expected
    assert needs(made, member, files, pools) == {"ram": 2 * (1000 + expected + WORKING_TORCH)}
    said = arithmetic(made, member, files, pools)
    assert f"{expected / 2**30:.2f} GiB for keys and values (its context is {context:,} tokens)" in said
    assert "each of 2 replicas" in said
    less = config({"a": ModelEntry(model=str(tmp_path / "m"), kv_cache_gib=0.5)})
    assert kv_bytes(less, fleet(less)[0], files, pools) == 2**29


def test_versions_carry_their_own_names_where_a_name_may_change_what_it_stands_for() -> None:
    assert [member.files.public_name for member in fleet(config(CHAT))] == ["chat@1", "chat@2", "chat@3", "other@a"]
    alone = fleet(config({"a": ModelEntry(model="echo", aliases=("b",))}))
    assert alone[0].files.public_name == "a"
    assert fetched(fleet(config(CHAT))[0]).public_name == "chat@1"


def test_what_a_section_doesnt_say_is_as_for_the_default_model(tmp_path: Path) -> None:
    tiny(tmp_path / "m", 64)
    folder = str(tmp_path / "m")
    models = {"a": ModelEntry(model=folder), "b": ModelEntry(model=folder, quantize="int4", engine="auto"), "c": ModelEntry(model="echo")}
    members = fleet(config(models, engine="transformers", quantize="int8"))
    assert [(each.section.engine, each.section.quantize) for each in members] == [
        ("transformers", "int8"),
        ("auto", "int4"),
        ("auto", None),
    ]


def test_types_have_short_names() -> None:
    said = [section.model_validate({"dtype": "bf16"}).dtype for section in (ModelSection, ModelEntry)]
    assert said == ["bfloat16", "bfloat16"]
    assert ModelSection.model_validate({"dtype": "fp16"}).dtype == "float16"
    with pytest.raises(ValueError, match="float32"):
        ModelSection.model_validate({"dtype": "fp8"})


def test_likeness_is_of_words_in_their_order() -> None:
    assert likeness("The sea is blue", "the sea is  blue") == 1
    assert likeness("the sea is blue", "the sea is red") == pytest.approx(0.75)
    assert likeness("", "something") == 0
    prompts = (GoldenPrompt(prompt="2+2=", expect="4"), GoldenPrompt(prompt="Hello"))
    assert drift(prompts, ["It is 4.", "a b"], ["?", "a b"]) == (1.0, drift(prompts, ["It is 4.", "a b"], ["?", "a b"])[1])
    mean, why = drift(prompts, ["five", "a b"], None)
    assert (mean, "'2+2='" in why) == (0, True)


def test_what_names_stand_for_outlives_the_server(tmp_path: Path) -> None:
    file = tmp_path / "promotions.json"
    current, names = {"a": "a@1", "b": "b@1"}, ["a@1", "a@2", "b@1"]
    assert remembered(file, current, names) == (current, {})
    for damaged in ("{", "[]", '{"current": {"a": 3, "b": "b@gone"}, "before": {"a": [], "b": 7}}'):
        file.write_text(damaged)
        assert remembered(file, current, names) == (current, {})
    file.write_text('{"a": "a@2"}')
    assert remembered(file, current, names) == ({"a": "a@2", "b": "b@1"}, {})
    file.write_text('{"current": {"a": "a@2"}, "before": {"a": "a@1", "b": "b@9"}}')
    assert remembered(file, current, names) == ({"a": "a@2", "b": "b@1"}, {"a": "a@1"})
