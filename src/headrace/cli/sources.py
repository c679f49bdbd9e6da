"""Where the configuration comes from: flags over environment over `.env` over TOML over defaults.

This is the only place that reads the environment. Every value is remembered with its origin, for `headrace config`
and for error messages. pydantic checks the values; finding them is done here, because pydantic-settings knows neither where a
value came from nor which name was meant.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from dotenv import dotenv_values
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from headrace.config import Config, Section, fields, sections
from headrace.errors import ConfigError

PREFIX = "HEADRACE_"
CONFIG_VARIABLE = "HEADRACE_CONFIG"
DEFAULT_FILE = "headrace.toml"

_FURTHER_NAMES: dict[str, tuple[str, ...]] = {
    "model": ("HEADRACE_MODEL_PATH", "MODEL_PATH"),
    "port": ("HEADRACE_API_PORT", "API_PORT"),
    "max_workers": ("MAX_WORKERS",),
    "log_level": ("LOG_LEVEL",),
    "cache_dir": ("HEADRACE_CACHE",),
    "otel_endpoint": ("OTEL_EXPORTER_OTLP_ENDPOINT",),
    "otel_service_name": ("OTEL_SERVICE_NAME",),
}
"""Environment names besides HEADRACE_<FIELD>, strongest first. Those without prefix are the tutorial's and OpenTelemetry's."""

_LEVELS = {"warn": "warning", "critical": "error", "fatal": "error", "trace": "debug", "notset": "debug"}
"""Levels that other programs know, for a shared LOG_LEVEL: the nearest of ours."""

Kind = Literal["flag", "environment", ".env", "toml", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from."""

    kind: Kind = "default"
    place: str = ""
    """The file, for `.env` and `toml`."""
    key: str = ""
    """The flag's, variable's or key's name there."""
    line: int | None = None

    def __str__(self) -> str:
        if self.kind == "default":
            return "default"
        if self.kind in ("flag", "environment"):
            return f"{self.kind} {self.key}"
        return f"{self.place}{f', line {self.line}' if self.line else ''}: {self.key}"


@dataclass(frozen=True, slots=True)
class Loaded:
    config: Config
    origins: Mapping[str, Origin]
    """By flat name, every field."""
    file: Path | None
    """The TOML file that was read."""


def environment_names(field: str) -> tuple[str, ...]:
    """The environment variables that set a field; the first one set wins."""
    return (PREFIX + field.upper(), *_FURTHER_NAMES.get(field, ()))


def is_secret(field: str) -> bool:
    return _mentions(_field_info(field).annotation, SecretStr)


def load(
    flags: Mapping[str, object] | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Loaded:
    """Read all sources and check them.

    `flags` are flat names and values, None where a flag was not given; `file` is `--config`; `environ` and `folder`
    default to the process's. Raises `ConfigError`, which lists every problem and shows no secret.
    """
    environ = os.environ if environ is None else environ
    folder = Path.cwd() if folder is None else folder
    problems: list[str] = []

    dotenv = _read_dotenv(folder / ".env")
    toml_path = _toml_path(file, environ, dotenv, folder)
    values: dict[str, object] = {}
    origins: dict[str, Origin] = {field: Origin() for field in fields()}
    layers = (
        _from_toml(toml_path, problems),
        _from_variables(dotenv, ".env", problems),
        _from_variables(environ, "environment", problems),
        _from_flags(flags or {}),
    )
    for layer in layers:
        for field, value, origin in layer:
            values[field], origins[field] = value, origin

    config = _checked(values, origins, problems)
    if config is None:
        if len(problems) == 1:
            raise ConfigError(problems[0])
        raise ConfigError(f"The configuration has {len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))
    return Loaded(config=config, origins=origins, file=toml_path)


def shown(field: str, value: object) -> object:
    """A value as it may be printed: secrets are ***, paths and tuples are what JSON knows, a URL's password is hidden."""
    if is_secret(field):
        if isinstance(value, tuple):
            return ["***"] * len(value)
        return None if value is None else "***"
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        plain = {
            name: each.model_dump(mode="json", exclude_none=True, exclude_unset=True)
            for name, each in value.items()
            if isinstance(each, Section)
        }
        return {**value, **plain}
    if isinstance(value, str) and "://" in value:
        value = re.sub(r"(?<=://)[^/@\s]+@", "***@", value)
        return re.sub(r"(?i)([?&][^=&]*(?:key|token|secret|password)[^=&]*=)[^&]+", r"\1***", value)
    return value


# Reading


def _read_dotenv(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {_reason(error)}.") from error
    return {name: value for name, value in dotenv_values(stream=StringIO(text)).items() if value is not None}


def _toml_path(flag: Path | None, environ: Mapping[str, str], dotenv: Mapping[str, str], folder: Path) -> Path | None:
    named: list[tuple[str, str]] = [("flag --config", str(flag))] if flag is not None else []
    named += [(f"environment {CONFIG_VARIABLE}", environ[CONFIG_VARIABLE])] if environ.get(CONFIG_VARIABLE, "").strip() else []
    named += [(f".env {CONFIG_VARIABLE}", dotenv[CONFIG_VARIABLE])] if dotenv.get(CONFIG_VARIABLE, "").strip() else []
    if named:
        origin, name = named[0]
        path = folder / Path(name.strip()).expanduser()
        if not path.is_file():
            raise ConfigError(f"{origin}: there is no file {name}.")
        return path
    path = folder / DEFAULT_FILE
    return path if path.is_file() else None


def _from_toml(path: Path | None, problems: list[str]) -> Iterator[tuple[str, object, Origin]]:
    if path is None:
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {_reason(error)}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    known = fields()
    for key, value in table.items():
        origin = Origin("toml", str(path), key, _line_of(text, key))
        if key in known:
            yield key, value, origin
        elif isinstance(value, dict):
            inner = next((name for name in value if name in known), None)
            example = f"; write {inner} = … above all [sections]" if inner else ""
            problems.append(f"{origin} is a section, but keys are flat, at the top level{example}.")
        else:
            nearest = _nearest(key.lower().replace("-", "_"), {field: field for field in known} | _by_short_name())
            problems.append(f"{origin} is not a known key; {_advice(nearest)}")


def _from_variables(variables: Mapping[str, str], place: Kind, problems: list[str]) -> Iterator[tuple[str, object, Origin]]:
    taken: set[str] = set()
    in_kubernetes = "KUBERNETES_SERVICE_HOST" in variables
    for field in fields():
        for name in environment_names(field):
            taken.add(name)
        for name in environment_names(field):
            value = variables.get(name, "").strip()
            # Compose files pass variables on that are not set as empty ones.
            if not value or (in_kubernetes and _is_service_link(name, value)):
                continue
            origin = Origin(place, ".env" if place == ".env" else "", name)
            yield field, _split(field, value), origin
            break
    for name in variables:
        if not name.upper().startswith(PREFIX) or name in taken or name == CONFIG_VARIABLE:
            continue
        if in_kubernetes and _is_service_link(name, variables[name]):
            continue
        candidates = {CONFIG_VARIABLE.removeprefix(PREFIX): CONFIG_VARIABLE}
        candidates |= {known.removeprefix(PREFIX): known for known in taken if known.startswith(PREFIX)}
        nearest = _nearest(name.upper().removeprefix(PREFIX), candidates)
        problems.append(f"{place}: {name} is not a known variable; {_advice(nearest)}")


def _from_flags(flags: Mapping[str, object]) -> Iterator[tuple[str, object, Origin]]:
    for field, value in flags.items():
        if value is not None:
            key = "MODEL" if field == "model" else "--" + field.replace("_", "-")
            yield field, _split(field, value) if isinstance(value, str) else value, Origin("flag", key=key)


def _is_service_link(name: str, value: str) -> bool:
    """Kubernetes sets HEADRACE_PORT=tcp://… and more in every pod beside a service named headrace; these are not ours."""
    return bool(
        re.fullmatch(r"HEADRACE(_\w+)?_SERVICE_(HOST|PORT(_\w+)?)", name)
        or re.fullmatch(r"HEADRACE(_\w+)?_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?", name)
        or (name.endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value))
    )


def _split(field: str, value: str) -> object:
    """Lists are comma-separated outside TOML."""
    if get_origin(_field_info(field).annotation) is not tuple:
        return value
    if value.startswith("["):
        return value  # somebody wrote JSON; pydantic's refusal is better than a key that begins with a bracket
    return tuple(item.strip() for item in value.split(",") if item.strip())


# Checking


def _checked(values: Mapping[str, object], origins: Mapping[str, Origin], problems: list[str]) -> Config | None:
    made: dict[str, Section] = {}
    for name, cls in sections().items():
        given = {field: _normal(field, values[field]) for field in cls.model_fields if field in values}
        confused = [
            field for field, value in given.items() if isinstance(value, bool) and not _mentions(_field_info(field).annotation, bool)
        ]
        for field in confused:  # pydantic would take true for 1
            problems.append(f"{origins[field]}: a truth value makes no sense here.")
            del given[field]
        try:
            section = cls.model_validate(given)
        except ValidationError as error:
            problems += _explained(error, given, origins)
            continue
        made[name] = _expanded(section, origins, problems)
    return None if problems else Config.model_validate(made)


def _normal(field: str, value: object) -> object:
    if field == "log_level" and isinstance(value, str):
        return _LEVELS.get(value.lower(), value.lower())
    return value


def _explained(error: ValidationError, given: Mapping[str, object], origins: Mapping[str, Origin]) -> Iterator[str]:
    said: set[str] = set()
    for problem in error.errors(include_url=False, include_context=False):
        field = str(problem["loc"][0])
        if len(problem["loc"]) > 1 and isinstance(given[field], dict) and (inner := _section_within(field)) is not None:
            yield _explained_within(inner, problem["loc"], problem["type"], problem["msg"], given[field], origins[field])
            continue
        if field in said:
            continue
        said.add(field)
        value = given[field]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "tuple_type":
            message = (
                'a list is an array here, such as ["a", "b"]' if origins[field].kind == "toml" else "a list is comma-separated here, a,b"
            )
        what = "this value is not valid" if is_secret(field) else f"{shown(field, value)!r} is not valid"
        yield f"{origins[field]}: {what}: {message}."


def _section_within(field: str) -> type[Section] | None:
    """Of a table of sections, such as [models.NAME], what each of them is."""
    arguments = get_args(_field_info(field).annotation)
    return arguments[1] if len(arguments) == 2 and isinstance(arguments[1], type) and issubclass(arguments[1], Section) else None


def _explained_within(inner: type[Section], loc: tuple[int | str, ...], kind: str, said: str, table: object, origin: Origin) -> str:
    """A problem with a key of a section in a table of sections. `loc` is the table, the section's name, the key, and more."""
    path = [str(part) for part in loc]
    named = ".".join(path)
    if origin.kind in ("toml", ".env") and origin.place:
        line = _line_within(Path(origin.place), path) if origin.kind == "toml" else None
        place = f"{origin.place}{f', line {line}' if line else ''}: {named}"
    else:
        place = f"{origin}: {named}"
    if kind == "extra_forbidden":
        nearest = _nearest(path[-1].lower().replace("-", "_"), {field: field for field in inner.model_fields})
        advice = f"did you mean {nearest}?" if nearest else f"there is {', '.join(inner.model_fields)}."
        return f"{place} is not a known key; {advice}"
    value = table
    for part in loc[1:]:
        value = value.get(part) if isinstance(value, dict) else None
    secret = len(path) > 2 and path[2] in inner.model_fields and _mentions(inner.model_fields[path[2]].annotation, SecretStr)
    what = "this value is not valid" if secret or isinstance(value, dict | None) else f"{value!r} is not valid"
    return f"{place}: {what}: {said.removeprefix('Value error, ')}."


def _line_within(file: Path, path: list[str]) -> int | None:
    """Where the key is, in the section of that name."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    wanted, found = path[:2], None
    for number, line in enumerate(lines, 1):
        if header := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
            name = [part.strip("\"'") for part in re.findall(r"""\"[^"]*\"|'[^']*'|[^.\s]+""", header[1])]
            found = number if name == wanted else None
        elif found and len(path) > 2 and re.match(rf"""\s*["']?{re.escape(path[2])}["']?\s*=""", line):
            return number
    return None


def _expanded(section: Section, origins: Mapping[str, Origin], problems: list[str]) -> Section:
    changed: dict[str, object] = {}
    for field in type(section).model_fields:
        value = getattr(section, field)
        if isinstance(value, Path):
            try:
                changed[field] = value.expanduser()
            except RuntimeError:
                problems.append(f"{origins[field]}: {field} is {value}, but there is no home folder; set {environment_names(field)[-1]}.")
    return section.model_copy(update=changed)


# Words


def _field_info(field: str) -> FieldInfo:
    return sections()[fields()[field]].model_fields[field]


def _mentions(annotation: object, wanted: type) -> bool:
    if annotation is wanted:
        return True
    if get_origin(annotation) in (Union, UnionType, tuple):
        return any(_mentions(part, wanted) for part in get_args(annotation) if part is not NoneType)
    return False


def _by_short_name() -> dict[str, str]:
    """What somebody who knows the environment's names might write in TOML, with the right key."""
    return {name.removeprefix(PREFIX).lower(): field for field in _FURTHER_NAMES for name in environment_names(field)}


def _nearest(word: str, candidates: Mapping[str, str]) -> str | None:
    found = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return candidates[found[0]] if found else None


def _advice(nearest: str | None) -> str:
    return f"did you mean {nearest}?" if nearest else "`headrace config` lists all names."


def _line_of(text: str, key: str) -> int | None:
    pattern = re.compile(rf"""\s*(\[+\s*)?["']?{re.escape(key)}["']?\s*[=.\]]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), None)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 (byte {error.start})"
    return error.strerror or type(error).__name__
