"""From the configuration to rules. Whatever can't be used is refused here, at start, with the reason."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from headrace.config import FilterSection
from headrace.errors import ConfigError
from headrace.policies.filters.automaton import Alphabet, Automaton, Machine
from headrace.policies.filters.glance import Glance
from headrace.policies.filters.personal import PERSONAL, Personal
from headrace.policies.filters.stream import Action, Detector, Rules
from headrace.policies.filters.syntax import Node, Parser, PatternError, endless, size, width
from headrace.policies.filters.words import Words

MAX_WIDTH = 4096
"""Characters that a match of an output pattern may have at most; so much is held back in the worst case."""
MAX_SIZE = 20_000
"""Places in all output patterns of a server together, with their repetitions written out."""
MAX_WORD = 512

_ASCII_CLASS = re.compile(r"\[(?!\^)[ -Z_-~]+\]|\\[dsw]")
"""Classes that plainly have no characters beyond ASCII, which saves asking RE2 for each of those."""

_MACHINES = (("email",), ("phone", "card", "cn_id"), ("secret",))
"""Kinds that share an automaton. Those whose matches under way are many ways to count the same text are kept apart."""


def output_rules(section: FilterSection) -> Rules | None:
    """What answers are filtered with; None where nothing is asked for. Raises `ConfigError`."""
    _refuse_unknown(section.pii_kinds)
    machines: list[tuple[Machine, tuple[Detector, ...]]] = []
    deny: Action = section.deny_action
    alphabet = Alphabet(belongs)
    if section.deny_output:
        machines.append(_words(section.deny_output, deny))
    if section.deny_output_patterns:
        nodes = [finite(pattern) for pattern in section.deny_output_patterns]
        if sum(map(size, nodes)) > MAX_SIZE:
            raise ConfigError(f"deny_output_patterns: together they are too large ({MAX_SIZE} places); make their repetitions smaller.")
        machines.append((Automaton(nodes, alphabet), tuple(Detector("deny", deny) for _ in nodes)))
    if section.pii_output != "off":
        machines += personal_machines(section.pii_kinds, section.pii_output, alphabet)
    return Rules(tuple(machines), section.filter_mask) if machines else None


def input_rules(section: FilterSection) -> Rules | None:
    """The words that refuse a prompt and the personal data masked in it; None where nothing is asked for. Raises `ConfigError`."""
    _refuse_unknown(section.pii_kinds)
    machines: list[tuple[Machine, tuple[Detector, ...]]] = []
    nodes: list[Node] = []
    if section.deny_input:
        machines.append(_words(section.deny_input, "refuse"))
    if section.pii_input != "off":
        machines += personal_machines(section.pii_kinds, section.pii_input, Alphabet(belongs))
        nodes = [node for kind in section.pii_kinds for personal in PERSONAL[kind] for node in parsed(personal)]
    return Rules(tuple(machines), section.filter_mask, Glance(section.deny_input, nodes)) if machines else None


def input_patterns(section: FilterSection) -> list[Any]:
    """RE2 expressions, over bytes. Prompts come whole, so theirs need no end. Raises `ConfigError`."""
    return [_compiled("deny_input_patterns", pattern) for pattern in section.deny_input_patterns]


def personal_machines(kinds: Sequence[str], action: Action, alphabet: Alphabet) -> list[tuple[Machine, tuple[Detector, ...]]]:
    made: list[tuple[Machine, tuple[Detector, ...]]] = []
    for group in _MACHINES:
        nodes: list[Node] = []
        detectors: list[Detector] = []
        for personal in (personal for kind in group if kind in kinds for personal in PERSONAL[kind]):
            nodes += parsed(personal)
            detectors += [Detector(personal.kind, action, personal.check)] * len(personal.patterns)
        if nodes:
            made.append((Automaton(nodes, alphabet), tuple(detectors)))
    return made


def _refuse_unknown(kinds: Sequence[str]) -> None:
    """Also where none is looked for: who switches that on later means what stands there."""
    for kind in kinds:
        if kind not in PERSONAL:
            near = difflib.get_close_matches(kind, PERSONAL, 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"pii_kinds: there is no kind {kind!r}; there is {', '.join(PERSONAL)}.{meant}")


def parsed(personal: Personal) -> list[Node]:
    return [Parser(pattern, boundaries=True).parse() for pattern in personal.patterns]


def _words(words: Sequence[str], action: Action) -> tuple[Machine, tuple[Detector, ...]]:
    for word in words:
        if not word.strip() or len(word) > MAX_WORD:
            raise ConfigError(f"A denied word has 1 to {MAX_WORD} characters, and not only blanks: {_short(word)} has {len(word)}.")
    return Words(words), (Detector("deny", action),) * len(words)


def finite(pattern: str) -> Node:
    """A pattern for streams. Raises `ConfigError` where RE2 refuses it, or a match of it has no longest length."""
    where = "deny_output_patterns"
    _compiled(where, pattern)
    try:
        node = Parser(pattern).parse()
    except PatternError as error:
        raise ConfigError(f"{where}: {_short(pattern)} can't be used: {error}.") from None
    repetition = endless(node)
    if repetition is not None:
        raise ConfigError(
            f"{where}: {_short(pattern)} can match without end because of `{repetition}`, and a stream can't wait for that. "
            f"Give it a limit, such as {{1,100}}."
        )
    widest = width(node)
    if widest == 0:
        raise ConfigError(f"{where}: {_short(pattern)} matches no character at all.")
    if widest > MAX_WIDTH or size(node) > MAX_SIZE:
        raise ConfigError(
            f"{where}: {_short(pattern)} is too large: a match can have {widest:.0f} characters (at most {MAX_WIDTH}), "
            f"and it has {size(node):.0f} places (at most {MAX_SIZE}). Make its repetitions smaller."
        )
    return node


def _compiled(where: str, pattern: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        reason = error.args[0] if isinstance(error, re2.error) else error
        said = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ConfigError(
            f"{where}: {_short(pattern)} is no RE2 pattern: {said}. RE2 can't look around or refer back; see https://github.com/google/re2/wiki/Syntax."
        ) from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")


def belongs(source: str) -> Callable[[str], bool]:
    """Whether a character is one that the RE2 pattern `source` matches."""
    if source.startswith(r"\x{") and source.endswith("}"):
        return chr(int(source[3:-1], 16)).__eq__
    expression = _character(source)
    if _ASCII_CLASS.fullmatch(source):
        return lambda character: character.isascii() and expression.fullmatch(character) is not None
    # Half of a surrogate pair can't be encoded otherwise; RE2 takes it for a character.
    return lambda character: expression.fullmatch(character.encode("utf-8", "surrogatepass")) is not None


@lru_cache(maxsize=4096)
def _character(source: str) -> Any:
    import re2

    return re2.compile(source)
