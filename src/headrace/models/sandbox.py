"""jinja2's sandbox for chat templates, with limits on time and on the size of what is built.

A template comes with the model, from whoever published it. The sandbox keeps it from Python's insides; the limits here
keep it from running or growing for ever.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST = 1 << 25
"""Characters or items that one operation may produce: four times the default limit of a request's body."""

_FILTERS = frozenset(
    {
        "abs",
        "attr",
        "batch",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "groupby",
        "indent",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "slice",
        "sort",
        "string",
        "sum",
        "title",
        "tojson",
        "trim",
        "truncate",
        "unique",
        "upper",
    }
)
"""Left out are those that no chat template needs and that build text of any size from a number."""

_WIDE = re.compile(r"\d{4}|\{[^{}]*\{")

_TEXT_METHODS = frozenset(
    {
        "capitalize",
        "casefold",
        "count",
        "endswith",
        "find",
        "index",
        "isalnum",
        "isalpha",
        "isascii",
        "isdecimal",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
    }
)


class TemplateRefusal(TemplateError):
    """The template itself refused the conversation (`raise_exception`)."""


class TemplateRanAway(BaseException):
    """Rendering hit its time limit. No `Exception`, so that nothing on the way catches it."""


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`~` goes through the environment too, which looks at the size."""
        self.write("environment.concat([str(part) for part in (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")])")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; rendering passes through it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment that transformers gives chat templates (`utils/chat_template_utils.py`), with the limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//", "/"})
    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
        self.filters = {name: code for name, code in self.filters.items() if name in _FILTERS}
        self.filters |= {"tojson": _tojson, "replace": _replace, "join": _join, "indent": _indent}
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        texts = list(parts)
        if sum(map(len, texts)) > LARGEST:
            raise SecurityError("the text is too long")
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            if not isinstance(left, (int, float)) or not isinstance(right, (int, float)) or abs(right) > 64 or abs(left) > 1 << 32:
                raise SecurityError("the power is too large")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("text can't be formatted with %")
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__") and len(left) + len(right) > LARGEST:
            raise SecurityError("the sum is too long")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (str, bytes)) and attr not in _TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str) and getattr(value, "__name__", "") in ("format", "format_map") and _WIDE.search(owner):
            raise SecurityError("the width in the format is too large")
        return super().wrap_str_format(value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            name = getattr(__obj, "__name__", "")
            if name == "replace" and len(args) >= 2:
                return _replace_text(owner, str(args[0]), str(args[1]), *args[2:3])
            if name == "join" and args:
                return _joined(owner, args[0])
        return super().call(__context, __obj, *args, **kwargs)


def _joined(separator: str, parts: Iterable[Any]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) + len(separator) * len(texts) > LARGEST:
        raise SecurityError("the text is too long")
    return separator.join(texts)


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        value = [item.get(attribute, "") if isinstance(item, dict) else "" for item in value]
    return _joined(str(d), value)


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > 256:
            raise SecurityError("the product is too large")
        return
    for sequence, times in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(times, int) and len(sequence) * times > LARGEST:
            raise SecurityError("the product is too long")


def _replace_text(text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old)
    if count >= 0:
        found = min(found, count)
    if len(text) + found * (len(new) - len(old)) > LARGEST:
        raise SecurityError("the text is too long")
    return text.replace(old, new, count)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    return _replace_text(str(text), str(old), str(new), -1 if count is None else count)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = width if isinstance(width, str) else " " * min(width, 256)
    lines = str(text).splitlines() or [""]
    if len(space) * len(lines) > LARGEST:
        raise SecurityError("the text is too long")
    indented = [space + line if line or blank else line for line in lines]
    return "\n".join(indented if first else [lines[0], *indented[1:]])


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Without jinja2's HTML escapes, as transformers has it."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError("the indent is too wide")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 64:
        raise SecurityError("the date's format is too long")
    return datetime.now().strftime(form)


class Watchdog:
    """Ends what a thread does when its time is up: one thread for all, asleep while nobody renders.

    `PyThreadState_SetAsyncExc` reaches pure Python code only; that single operations can't run long is the sandbox's part.
    """

    _TICK = 0.05
    _LINGER = 40
    """Ticks that it stays awake with nothing to watch: to wake a thread costs as much as rendering a short conversation does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[int, float] = {}
        self._fired: set[int] = set()
        self._wake = threading.Event()
        self._awake = False
        self._started = False

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Raises `TemplateRanAway` in this thread if the block takes longer. Not to be nested."""
        me = threading.get_ident()
        self._watched[me] = time.monotonic() + seconds
        if not self._awake:
            if not self._started:
                self._start()
            self._wake.set()
        try:
            yield
        finally:
            with self._lock:
                del self._watched[me]
                fired = me in self._fired
                self._fired.discard(me)
                if fired:
                    # It may not have been delivered yet; then it would surface in whatever runs next.
                    _raise_in(me, None)
            if fired:
                raise TemplateRanAway

    def _start(self) -> None:
        with self._lock:
            if not self._started:
                self._started = True
                threading.Thread(target=self._watch, name="template-watchdog", daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            self._awake = True
            idle = 0
            while idle < self._LINGER:
                time.sleep(self._TICK)
                idle = 0 if self._watched else idle + 1
                self._fire()
            self._awake = False
            if self._watched:  # it began when we still looked awake
                self._wake.set()

    def _fire(self) -> None:
        now = time.monotonic()
        with self._lock:
            for thread, deadline in list(self._watched.items()):
                if now > deadline and thread not in self._fired:
                    self._fired.add(thread)
                    _raise_in(thread, TemplateRanAway)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
