from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli.flags import FLAGS
from headrace.cli.sources import Loaded, environment_names, is_secret, load, shown
from headrace.config import Config, fields, sections
from headrace.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def value(loaded: Loaded, field: str) -> object:
    return getattr(getattr(loaded.config, fields()[field]), field)


def refusal(folder: Path, **given: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder=folder, **{"environ": {}, **given})  # type: ignore[arg-type]
    return caught.value.message


def test_defaults(folder: Path) -> None:
    loaded = load(environ={}, folder=folder)
    assert loaded.config.server == Config().server
    assert {str(origin) for origin in loaded.origins.values()} == {"default"}
    assert set(loaded.origins) == set(fields())
    assert loaded.config.model.cache_dir == Path.home() / ".cache/headrace"


def test_each_source_beats_the_next(folder: Path) -> None:
    (folder / "headrace.toml").write_text("max_batch = 1\nport = 1\nmax_workers = 1\ndrain_timeout = 1\n")
    (folder / ".env").write_text("HEADRACE_PORT=2\nHEADRACE_MAX_WORKERS=2\nHEADRACE_DRAIN_TIMEOUT=2\n")
    environ = {"HEADRACE_PORT": "3", "HEADRACE_DRAIN_TIMEOUT": "3"}
    loaded = load({"port": 4, "max_batch": None}, environ=environ, folder=folder)
    server = loaded.config.server
    assert (server.port, server.drain_timeout, server.max_workers, server.max_batch) == (4, 3.0, 2, 1)
    assert str(loaded.origins["port"]) == "flag --port"
    assert str(loaded.origins["drain_timeout"]) == "environment HEADRACE_DRAIN_TIMEOUT"
    assert str(loaded.origins["max_workers"]) == ".env: HEADRACE_MAX_WORKERS"
    assert str(loaded.origins["max_batch"]) == f"{folder / 'headrace.toml'}, line 1: max_batch"
    assert str(loaded.origins["host"]) == "default"
    assert loaded.file == folder / "headrace.toml"


@pytest.mark.parametrize(
    ("name", "said", "field", "wanted"),
    [
        ("MODEL_PATH", "echo", "model", "echo"),
        ("HEADRACE_MODEL_PATH", "echo", "model", "echo"),
        ("HEADRACE_MODEL", "echo", "model", "echo"),
        ("API_PORT", "9000", "port", 9000),
        ("HEADRACE_API_PORT", "9000", "port", 9000),
        ("HEADRACE_PORT", " 9000 ", "port", 9000),
        ("MAX_WORKERS", "3", "max_workers", 3),
        ("HEADRACE_MAX_WORKERS", "3", "max_workers", 3),
        ("LOG_LEVEL", "INFO", "log_level", "info"),
        ("LOG_LEVEL", "WARN", "log_level", "warning"),
        ("LOG_LEVEL", "Critical", "log_level", "error"),
        ("HEADRACE_LOG_LEVEL", "DEBUG", "log_level", "debug"),
        ("HEADRACE_CACHE", "/models", "cache_dir", Path("/models")),
        ("HEADRACE_CACHE_DIR", "/models", "cache_dir", Path("/models")),
        ("HEADRACE_CACHE", "~/models", "cache_dir", Path.home() / "models"),
        ("HEADRACE_HUB", "modelscope", "hub", "modelscope"),
        ("HEADRACE_DOCS", "no", "docs", False),
        (
            "HEADRACE_CORS_ORIGINS",
            "https://a.example, https://b.example:8443",
            "cors_origins",
            ("https://a.example", "https://b.example:8443"),
        ),
        ("HEADRACE_CORS_ORIGINS", "*", "cors_origins", ("*",)),
        ("HEADRACE_TRUSTED_PROXIES", "10.0.0.0/8,::1", "trusted_proxies", ("10.0.0.0/8", "::1")),
    ],
)
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_names(folder: Path, name: str, said: str, field: str, wanted: object, place: str) -> None:
    if place == ".env":
        (folder / ".env").write_text(f'{name}="{said}"\n')
    loaded = load(environ={name: said} if place == "environment" else {}, folder=folder)
    assert value(loaded, field) == wanted
    assert loaded.origins[field].kind == place
    assert loaded.origins[field].key == name


def test_prefixed_names_win_over_the_tutorials(folder: Path) -> None:
    loaded = load(environ={"API_PORT": "1", "HEADRACE_API_PORT": "2", "HEADRACE_PORT": "3"}, folder=folder)
    assert loaded.config.server.port == 3
    loaded = load(environ={"MODEL_PATH": "a", "HEADRACE_MODEL_PATH": "b"}, folder=folder)
    assert loaded.config.model.model == "b"


def test_the_real_environment_wins_over_dotenv_whatever_the_name(folder: Path) -> None:
    (folder / ".env").write_text("HEADRACE_PORT=1\n")
    assert load(environ={"API_PORT": "2"}, folder=folder).config.server.port == 2


def test_empty_variables_count_as_unset(folder: Path) -> None:
    (folder / ".env").write_text("HEADRACE_PORT=7\nHEADRACE_NAME=\nHEADRACE_THREADS\n")
    loaded = load(environ={"HEADRACE_PORT": "", "HEADRACE_MAX_WORKERS": " ", "HEADRACE_CONFIG": "", "MODEL_PATH": ""}, folder=folder)
    assert (loaded.config.server.port, loaded.config.server.max_workers, loaded.config.model.name) == (7, 1, None)


def test_keys_are_secret_and_comma_separated(folder: Path) -> None:
    loaded = load(environ={"HEADRACE_API_KEYS": "sk-one, sk-two,"}, folder=folder)
    assert [key.get_secret_value() for key in loaded.config.access.api_keys] == ["sk-one", "sk-two"]
    assert shown("api_keys", loaded.config.access.api_keys) == ["***", "***"]
    assert "sk-one" not in repr(loaded)


def test_lists_are_arrays_in_toml(folder: Path) -> None:
    (folder / "headrace.toml").write_text('api_keys = ["a,b", "c"]\n')
    assert [key.get_secret_value() for key in load(environ={}, folder=folder).config.access.api_keys] == ["a,b", "c"]
    (folder / "headrace.toml").write_text('cors_origins = "https://a.example"\n')
    assert 'array here, such as ["a", "b"]' in refusal(folder)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("HEADRACE_PROT", "HEADRACE_PORT"),
        ("HEADRACE_MAX_WORKER", "HEADRACE_MAX_WORKERS"),
        ("HEADRACE_CACHEDIR", "HEADRACE_CACHE_DIR"),
        ("HEADRACE_CONFG", "HEADRACE_CONFIG"),
        ("headrace_port", "HEADRACE_PORT"),
    ],
)
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_unknown_variables_name_the_nearest(folder: Path, wrong: str, right: str, place: str) -> None:
    if place == ".env":
        (folder / ".env").write_text(f"{wrong}=1\n")
    message = refusal(folder, environ={wrong: "1"} if place == "environment" else {})
    assert message == f"{place}: {wrong} is not a known variable; did you mean {right}?"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("prot", "port"),
        ("drain-timeout", "drain_timeout"),
        ("model_path", "model"),
        ("api_port", "port"),
        ("cache", "cache_dir"),
        ("apikeys", "api_keys"),
    ],
)
def test_unknown_toml_keys_name_file_line_and_the_nearest(folder: Path, wrong: str, right: str) -> None:
    (folder / "headrace.toml").write_text(f"# a comment\n{wrong} = 1\n")
    assert refusal(folder) == f"{folder / 'headrace.toml'}, line 2: {wrong} is not a known key; did you mean {right}?"


def test_nothing_near(folder: Path) -> None:
    assert "`headrace config` lists all names" in refusal(folder, environ={"HEADRACE_XYZZY": "1"})


def test_sections_in_toml_are_explained(folder: Path) -> None:
    (folder / "headrace.toml").write_text("[server]\nport = 1\n")
    message = refusal(folder)
    assert "line 1: server is a section" in message
    assert "write port = … above all [sections]" in message


def test_others_variables_are_none_of_our_business(folder: Path) -> None:
    (folder / ".env").write_text("DATABASE_URL=postgres://x\nPORT=abc\nFOO\nthis is no assignment ='\nHEADRACE_PORT=5\n")
    environ = {"SOME_TOKEN": "x", "PORT": "y", "NOT_HEADRACE_PORT": "z"}
    assert load(environ=environ, folder=folder).config.server.port == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("API_PORT", "eighty"),
        ("API_PORT", "65536"),
        ("API_PORT", "-1"),
        ("MAX_WORKERS", "0"),
        ("MAX_WORKERS", "1.5"),
        ("LOG_LEVEL", "loud"),
        ("HEADRACE_MAX_BODY_MIB", "nan"),
        ("HEADRACE_REQUEST_TIMEOUT", "inf"),
        ("HEADRACE_DRAIN_TIMEOUT", "-1"),
        ("HEADRACE_DOCS", "maybe"),
        ("HEADRACE_HUB", "github"),
        ("HEADRACE_WEIGHTS", "int3"),
        ("HEADRACE_TRUSTED_PROXIES", "10.0.0.0/99"),
        ("HEADRACE_CORS_ORIGINS", "https://a.example/"),
        ("HEADRACE_CORS_ORIGINS", "a.example"),
    ],
)
def test_bad_values_stop_the_start(folder: Path, name: str, said: str) -> None:
    message = refusal(folder, environ={name: said})
    assert message.startswith(f"environment {name}: ")
    assert said in message


@pytest.mark.parametrize(
    "text", ["port = true", "threads = false", "host = 1", "docs = 3.5", "cors_origins = [1]", 'host = ""', "port = 1979-05-27"]
)
def test_bad_values_in_toml(folder: Path, text: str) -> None:
    (folder / "headrace.toml").write_text("\n" + text)
    assert refusal(folder).startswith(f"{folder / 'headrace.toml'}, line 2: {text.partition(' ')[0]}: ")


def test_a_bad_flag(folder: Path) -> None:
    assert (
        refusal(folder, flags={"weights": "int3"})
        == "flag --weights: 'int3' is not valid: Input should be 'auto', 'int4', 'int8' or 'full'."
    )


def test_all_problems_at_once_and_no_secret_among_them(folder: Path) -> None:
    (folder / "headrace.toml").write_text('prot = 1\nremote_api_key = ["hidden-a"]\n')
    (folder / ".env").write_text("HEADRACE_THREADS=none\nHEADRACE_ADMIN_KEY=hidden-b\n")
    message = refusal(folder, environ={"HEADRACE_API_KEYS": "hidden-c with spaces", "MAX_WORKERS": "x"})
    assert message.startswith("The configuration has 6 problems:\n")
    for name in ("prot", "remote_api_key", "HEADRACE_THREADS", "HEADRACE_ADMIN_KEY", "HEADRACE_API_KEYS", "MAX_WORKERS"):
        assert name in message
    assert "hidden" not in message


def test_json_is_no_list_of_keys(folder: Path) -> None:
    message = refusal(folder, environ={"HEADRACE_API_KEYS": '["hidden"]'})
    assert "comma-separated" in message
    assert "hidden" not in message


def test_a_broken_toml_file_says_the_line(folder: Path) -> None:
    (folder / "headrace.toml").write_text("port = 1\nhost = \n")
    message = refusal(folder)
    assert str(folder / "headrace.toml") in message
    assert "line 2" in message


def test_files_that_are_not_text(folder: Path) -> None:
    (folder / "headrace.toml").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(folder)
    (folder / "headrace.toml").unlink()
    (folder / ".env").write_bytes(b"A=\xff")
    assert "not UTF-8" in refusal(folder)


def test_which_file_is_read(folder: Path) -> None:
    for number, name in enumerate(("headrace.toml", "flag.toml", "variable.toml", "dotenv.toml"), 1):
        (folder / name).write_text(f"port = {number}\n")
    assert load(environ={}, folder=folder).config.server.port == 1
    (folder / ".env").write_text("HEADRACE_CONFIG=dotenv.toml\n")
    assert load(environ={}, folder=folder).config.server.port == 4
    environ = {"HEADRACE_CONFIG": "variable.toml"}
    assert load(environ=environ, folder=folder).config.server.port == 3
    assert load(environ=environ, file=folder / "flag.toml", folder=folder).config.server.port == 2
    assert refusal(folder, file=Path("away.toml")) == "flag --config: there is no file away.toml."
    assert refusal(folder, environ={"HEADRACE_CONFIG": "away.toml"}) == "environment HEADRACE_CONFIG: there is no file away.toml."


def test_what_kubernetes_sets_for_a_service_of_our_name_is_not_ours(folder: Path) -> None:
    links = {
        "HEADRACE_PORT": "tcp://10.0.0.1:8000",
        "HEADRACE_SERVICE_HOST": "10.0.0.1",
        "HEADRACE_SERVICE_PORT": "8000",
        "HEADRACE_SERVICE_PORT_HTTP": "8000",
        "HEADRACE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "HEADRACE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert load(environ={**links, "KUBERNETES_SERVICE_HOST": "10.0.0.2"}, folder=folder).config.server.port == 8000
    assert "HEADRACE_SERVICE_HOST" in refusal(folder, environ=links)


def test_passwords_in_urls_are_hidden() -> None:
    assert shown("model", "https://me:pass@h.example/v1?api_key=x&a=b") == "https://***@h.example/v1?api_key=***&a=b"


def test_flags_are_fields_of_their_kind_and_cover_the_sections_that_a_start_is_about() -> None:
    for flag in FLAGS:
        annotation = str(sections()[fields()[flag.field]].model_fields[flag.field].annotation)
        if flag.kind in (int, float, bool):
            assert flag.kind.__name__ in annotation, flag.field
    wanted = {field for field, section in fields().items() if section in ("server", "access", "model", "engine", "log")}
    assert {flag.field for flag in FLAGS} >= {field for field in wanted if not is_secret(field)} - {"model"}


@settings(max_examples=60, deadline=None)
@given(
    field=st.sampled_from(sorted(fields())), said=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
)
def test_any_text_is_a_value_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, field: str, said: str) -> None:
    empty = tmp_path_factory.getbasetemp()
    name = environment_names(field)[0]
    try:
        loaded = load(environ={name: said}, folder=empty)
    except ConfigError:
        with pytest.raises(ConfigError, match=name):
            load(environ={name: said}, folder=empty)
    else:
        json.dumps(shown(field, value(loaded, field)))
