"""Makes a prompt from a conversation: the template's control tokens as control tokens, people's words as words.

Every text that comes with a conversation goes into the template between sentinels, with the names of control tokens broken
up by sentinels inside. A sentinel is a private-use character that occurs nowhere else. What the template prints is cut at
control tokens, which by then can only be the template's own; the rest is encoded as plain text, without the sentinels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import msgspec
from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.runtime import Context

from headrace.errors import BadRequest, InvalidParameter, ModelError, TooManyTokens
from headrace.models.byte_tokenizer import CHATML, ByteTokenizer
from headrace.models.card import read_card
from headrace.models.control_tokens import ControlSearch, ControlToken
from headrace.models.sandbox import TemplateRanAway, TemplateRefusal, TemplateSandbox, Watchdog
from headrace.models.tokenizer import load_text_tokenizer
from headrace.ports import ChatTemplate
from headrace.types import Message, ModelFiles

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_USUAL_SENTINEL = "\U0010c4a5"
_SHORT_SEGMENT = 256
_SEGMENTS_KEPT = 1024
_DEEPEST = 32

_watchdog = Watchdog()


class TextEncoder(Protocol):
    """What the template needs of a tokenizer."""

    @property
    def controls(self) -> Mapping[str, ControlToken]: ...
    def at_least(self, text: str) -> int: ...
    def encode(self, text: str, *, limit: int | None = None) -> list[int]: ...
    def encode_after_control(self, text: str, *, limit: int | None = None) -> list[int]: ...


def load_template(files: ModelFiles) -> ChatTemplate | None:
    """The model's own template; None for a base model. Raises `ModelError` for one that is broken or never ends."""
    if files.kind == "echo":
        return JinjaTemplate(CHATML, ByteTokenizer())
    if files.kind == "remote":
        return None
    card = read_card(Path(files.folder))
    if not card.chat_template:
        return None
    tokenizer = load_text_tokenizer(files)
    return JinjaTemplate(card.chat_template, tokenizer, bos_token=card.bos_token, eos_token=card.eos_token)


class JinjaTemplate:
    """A compiled chat template. `time_limit` is seconds of rendering."""

    def __init__(self, source: str, tokenizer: TextEncoder, *, bos_token: str = "", eos_token: str = "", time_limit: float = 1.0) -> None:
        self._tokenizer = tokenizer
        self._controls: dict[str, ControlToken] = dict(tokenizer.controls)
        self._search = ControlSearch(self._controls)
        self._time_limit = time_limit
        self._segments: dict[str, list[int]] = {}
        self._source = source
        try:
            with _watchdog.limit(10 * time_limit):
                self._template = TemplateSandbox().from_string(source)
            self._known: dict[str, Any] = {
                **self._template.globals,
                "bos_token": bos_token,
                "eos_token": eos_token,
                "add_generation_prompt": True,
            }
        except (TemplateSyntaxError, RecursionError, TemplateRanAway) as error:
            raise ModelError(f"The model's chat template can't be used ({error}). Fetch the model from another place.") from None
        self._thinks = "</think>" in source
        self._developer = "developer" in source
        self._probe()

    def encode(self, messages: Sequence[Message], *, limit: int | None = None) -> list[int]:
        if limit is not None:
            self._refuse_long(messages, limit)
        calls = [[_with_parsed_arguments(call) for call in message.tool_calls] for message in messages]
        sentinel = self._sentinel(messages, calls)
        rendered = self._render([self._message(message, called, sentinel) for message, called in zip(messages, calls, strict=True)])
        return self._encode(rendered, sentinel, limit)

    def _refuse_long(self, messages: Sequence[Message], limit: int) -> None:
        """Before any work on it: what is sure to be too long, by a histogram of its bytes."""
        if sum([len(message.content) for message in messages]) <= limit:
            return
        at_least = 0
        for message in messages:
            if message.role in self._printed:
                at_least += self._tokenizer.at_least(message.content.strip())
                if at_least > limit:
                    raise TooManyTokens(at_least)

    def _probe(self) -> None:
        """Learn which roles' words the template prints whole, and refuse the start with a template that never works."""
        self._printed: set[str] = set()
        probes = (("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "assistant", "tool"), ("developer", "user"))
        worked = False
        for roles in probes:
            messages = [Message(role=role, content=f"headrace probe {index} of {role}") for index, role in enumerate(roles)]
            try:
                rendered = self._render([{"role": message.role, "content": message.content} for message in messages])
            except BadRequest:
                continue
            worked = True
            self._printed |= {message.role for message in messages if message.content in rendered}
        if not worked:
            raise ModelError("The model's chat template can't render any conversation. Fetch the model from another place.")
        if "developer" not in self._source and "system" in self._printed:
            self._printed.add("developer")
        if "</think>" in self._source:
            # What an assistant thought is left out.
            self._printed.discard("assistant")

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            with _watchdog.limit(self._time_limit):
                template, environment = self._template, self._template.environment
                # What `Template.render` does, without copying and asking for each of the globals every time.
                context = Context(environment, self._known | {"messages": messages}, template.name, template.blocks)
                return environment.concat(template.root_render_func(context))
        except TemplateRefusal as refusal:
            raise BadRequest(f"The model's chat template refuses this conversation: {refusal}", param="messages") from None
        except TemplateRanAway:
            raise BadRequest(
                f"The model's chat template took longer than {self._time_limit:g} s for this conversation.", param="messages"
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
            raise BadRequest(f"The model's chat template can't render this conversation ({error}).", param="messages") from None

    def _sentinel(self, messages: Sequence[Message], calls: list[list[dict[str, Any]]]) -> str:
        sentinel = _USUAL_SENTINEL
        # Nobody can have guessed many of 65,534 random characters in one body.
        for _ in range(64):
            if sentinel not in self._source and not any(map(_holds, messages, calls, repeat(sentinel))):
                return sentinel
            sentinel = chr(random.randrange(0x100000, 0x10FFFE))
        raise InvalidParameter("The messages hold too many private-use characters.", param="messages")

    def _message(self, message: Message, calls: list[dict[str, Any]], sentinel: str) -> dict[str, Any]:
        role, content = message.role, message.content
        if role not in _ROLES:
            shown = role if len(role) <= 40 else role[:40] + "…"
            raise BadRequest(f"The role {shown!r} is not one of {', '.join(sorted(_ROLES))}.", param="messages")
        if role == "developer" and not self._developer:
            role = "system"
        if role == "assistant" and self._thinks and "</think>" in content:
            # Templates of thinking models cut at `</think>`, which broken up they no longer see.
            content = content.rpartition("</think>")[2]
        made: dict[str, Any] = {"role": role, "content": self._protect(content, sentinel)}
        if message.name is not None:
            made["name"] = self._protect(message.name, sentinel)
        if message.tool_call_id is not None:
            made["tool_call_id"] = self._protect(message.tool_call_id, sentinel)
        if calls:
            made["tool_calls"] = [self._protect_call(call, sentinel) for call in calls]
        return made

    def _protect(self, text: str, sentinel: str) -> str:
        """Sentinels go inside white space at the ends, so that a template's trimming works as ever."""
        core = text.strip()
        if not core:
            return text
        begin = text.find(core[0])
        return f"{text[:begin]}{sentinel}{self._search.broken(core, sentinel)}{sentinel}{text[begin + len(core) :]}"

    def _protect_call(self, call: dict[str, Any], sentinel: str) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in call.items():
            if key == "function" and isinstance(value, dict):
                made[key] = self._protect_call(value, sentinel)
            elif key == "type" and value == "function":
                made[key] = value
            else:
                known = key in ("id", "index", "name", "arguments")
                made[key if known else self._protect(key, sentinel)] = self._protect_deep(value, sentinel, _DEEPEST)
        return made

    def _protect_deep(self, value: Any, sentinel: str, depth: int) -> Any:
        if isinstance(value, str):
            return self._protect(value, sentinel)
        if isinstance(value, (dict, list)) and depth == 0:
            raise InvalidParameter(f"A tool call's arguments are nested deeper than {_DEEPEST}.", param="messages")
        if isinstance(value, dict):
            return {self._protect(str(key), sentinel): self._protect_deep(item, sentinel, depth - 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._protect_deep(item, sentinel, depth - 1) for item in value]
        return value

    def _encode(self, rendered: str, sentinel: str, limit: int | None) -> list[int]:
        tokens: list[int] = []
        start = 0
        before: ControlToken | None = None
        for begin, end, name in self._search.matches(rendered):
            control = self._controls[name]
            self._append(tokens, rendered[start:begin], before, control, sentinel, limit)
            tokens.append(control.id)
            before, start = control, end
        self._append(tokens, rendered[start:], before, None, sentinel, limit)
        if limit is not None and len(tokens) > limit:
            raise TooManyTokens(len(tokens))
        return tokens

    def _append(
        self,
        tokens: list[int],
        text: str,
        before: ControlToken | None,
        after: ControlToken | None,
        sentinel: str,
        limit: int | None,
    ) -> None:
        if before is not None and before.rstrip:
            text = text.lstrip()
        if after is not None and after.lstrip:
            text = text.rstrip()
        if not text:
            return
        if sentinel in text:
            tokens += self._plain(text.replace(sentinel, ""), before is None, len(tokens), limit)
        elif before is None or len(text) > _SHORT_SEGMENT:
            tokens += self._plain(text, before is None, len(tokens), limit)
        else:
            # The template's own words between two control tokens: always the same few.
            known = self._segments.get(text)
            if known is None:
                known = self._plain(text, False, 0, None)
                if len(self._segments) < _SEGMENTS_KEPT:
                    self._segments[text] = known
            tokens += known

    def _plain(self, text: str, first: bool, already: int, limit: int | None) -> list[int]:
        encode = self._tokenizer.encode if first else self._tokenizer.encode_after_control
        if limit is None:
            return encode(text)
        try:
            return encode(text, limit=max(limit - already, 0))
        except TooManyTokens as more:
            raise TooManyTokens(already + more.at_least) from None


def _holds(message: Message, calls: list[dict[str, Any]], character: str) -> bool:
    if character in message.content or (message.name is not None and character in message.name):
        return True
    if message.tool_call_id is not None and character in message.tool_call_id:
        return True
    return bool(calls) and _holds_deep(calls, character)


def _holds_deep(value: Any, character: str) -> bool:
    if isinstance(value, str):
        return character in value
    if isinstance(value, dict):
        return any(_holds_deep(key, character) or _holds_deep(item, character) for key, item in value.items())
    return isinstance(value, list) and any(_holds_deep(item, character) for item in value)


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Templates print arguments as JSON; what is JSON already must not become a string of JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.MsgspecError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
