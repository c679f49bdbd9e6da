"""Checks and cleans prompts: size, control characters, denied words and patterns, personal data."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from headrace.call import Call
from headrace.config import FilterSection
from headrace.errors import ContentRefused, InvalidParameter, Unsupported
from headrace.policies.filter_output import FilterOutput
from headrace.policies.filters.decisions import Decisions
from headrace.policies.filters.rules import input_patterns, input_rules, output_rules
from headrace.policies.filters.stream import Action, Rules, Stream
from headrace.ports import Step
from headrace.served import ServedModels
from headrace.types import Message

INLINE_CHARACTERS = 4096
"""Prompts up to this are checked on the event loop (a few milliseconds at most); longer ones in a thread."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""All but tab, line feed and carriage return."""


def filter_steps(section: FilterSection, *, models: ServedModels | None = None) -> tuple[Step, ...]:
    """The steps that a configuration asks for, to stand before `Prepare`; none where all is off. Raises `ConfigError`."""
    return (*filter_input_steps(section, models=models), *filter_output_steps(section))


def filter_input_steps(section: FilterSection, *, models: ServedModels | None = None) -> tuple[Step, ...]:
    rules, patterns = input_rules(section), input_patterns(section)
    if rules is None and not patterns and section.filter_control_characters == "keep" and section.filter_input_max_chars is None:
        return ()
    return (FilterInput(section, rules, patterns, models),)


def filter_output_steps(section: FilterSection) -> tuple[Step, ...]:
    rules = output_rules(section)
    return () if rules is None else (FilterOutput(rules, report=section.report_filters),)


class FilterInput:
    """Changes `call.messages` or `call.text`, or raises `InvalidParameter` (too long, control characters) or `ContentRefused`.

    A prompt of token ids is decoded and checked as text; where its text would be changed it is refused, for ids can't be masked.
    """

    def __init__(self, section: FilterSection, rules: Rules | None, patterns: list[Any], models: ServedModels | None) -> None:
        self._most = section.filter_input_max_chars
        self._control = section.filter_control_characters
        self._report = section.report_filters
        self._rules = rules
        self._patterns = patterns
        self._models = models

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        param = "messages" if call.messages is not None else "prompt"
        size = sum(map(len, _strings(call))) if call.tokens is None else 8 * len(call.tokens)
        if call.tokens is None:
            self._refuse_long(size, param)
        check = _Check(self, call, param)
        if size <= INLINE_CHARACTERS:
            check.run()
        else:
            await asyncio.to_thread(check.run)
        check.apply()
        yield

    def _refuse_long(self, size: int, param: str) -> None:
        if self._most is not None and size > self._most:
            raise InvalidParameter(f"The prompt has {size} characters, and this server takes {self._most}. Shorten it.", param=param)

    def clean(self, text: str, param: str, decide: Callable[[str, Action], None]) -> str:
        """One text as the model may see it. Raises `InvalidParameter` and `ContentRefused`."""
        if self._control != "keep" and _CONTROL.search(text) is not None:
            decide("control", self._control)
            if self._control == "refuse":
                raise InvalidParameter("The prompt has control characters, which this server refuses.", param=param)
            text = _CONTROL.sub("", text)
        if self._patterns:
            encoded = text.encode("utf-8", "surrogatepass")
            if any(pattern.search(encoded) is not None for pattern in self._patterns):
                decide("deny", "refuse")
                raise _refused("deny", param)
        if self._rules is not None and (self._rules.glance is None or self._rules.glance(text)):
            refusing: list[str] = []

            def decided(kind: str, action: Action) -> None:
                decide(kind, action)
                if action == "refuse":
                    refusing.append(kind)

            stream = Stream(self._rules, decided)
            masked = stream.feed(text)
            if not stream.blocked:
                masked += stream.finish()
            if refusing:
                raise _refused(refusing[0], param)
            text = masked
        return text

    def decoded(self, call: Call) -> str:
        """The text of a prompt of token ids."""
        model = self._models.find(call.model) if self._models is not None else None
        if model is None or model.tokenizer is None:
            raise Unsupported("This server filters prompts, and can't read one made of token ids; send text.", param="prompt")
        return model.tokenizer.decode(call.tokens or [])

    def check_tokens(self, call: Call, decide: Callable[[str, Action], None]) -> None:
        if not self._patterns and self._rules is None and self._most is None and self._control == "keep":
            return
        text = self.decoded(call)
        self._refuse_long(len(text), "prompt")
        if self.clean(text, "prompt", decide) != text:
            raise ContentRefused("The prompt has text that this server masks, and token ids can't be masked; send text.", param="prompt")

    def decisions(self, call: Call) -> Decisions:
        return Decisions(call, "input", report=self._report)


class _Check:
    """One call's check. `run` may be in a thread: it changes nothing but itself; `apply` does, on the event loop."""

    def __init__(self, step: FilterInput, call: Call, param: str) -> None:
        self._step = step
        self._call = call
        self._param = param
        self._made: list[tuple[str, Action]] = []
        self._error: Exception | None = None
        self._text: str | None = None
        self._messages: tuple[Message, ...] | None = None

    def _decide(self, kind: str, action: Action) -> None:
        self._made.append((kind, action))

    def _clean(self, text: str) -> str:
        return self._step.clean(text, self._param, self._decide)

    def run(self) -> None:
        call = self._call
        try:
            if call.tokens is not None:
                self._step.check_tokens(call, self._decide)
            if call.text is not None:
                self._text = self._clean(call.text)
            if call.messages is not None:
                self._messages = tuple(self._message(message) for message in call.messages)
        except (InvalidParameter, ContentRefused) as error:
            self._error = error

    def apply(self) -> None:
        if self._made:
            decisions = self._step.decisions(self._call)
            for kind, action in self._made:
                decisions(kind, action)
        if self._error is not None:
            raise self._error
        if self._text is not None:
            self._call.text = self._text
        if self._messages is not None:
            self._call.messages = self._messages

    def _message(self, message: Message) -> Message:
        content = self._clean(message.content)
        name = self._clean(message.name) if message.name is not None else None
        calls = tuple(self._value(tool_call) for tool_call in message.tool_calls)
        if content == message.content and name == message.name and calls == message.tool_calls:
            return message
        return msgspec.structs.replace(message, content=content, name=name, tool_calls=calls)

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._clean(value)
        if isinstance(value, dict):
            return {self._clean(key): self._value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._value(item) for item in value]
        return value


def _refused(kind: str, param: str) -> ContentRefused:
    return ContentRefused(f"This server's filter refuses the prompt ({kind}).", param=param)


def _strings(call: Call) -> Iterator[str]:
    if call.text is not None:
        yield call.text
    for message in call.messages or ():
        yield message.content
        if message.name is not None:
            yield message.name
        for tool_call in message.tool_calls:
            yield from _inside(tool_call)


def _inside(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _inside(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item)
