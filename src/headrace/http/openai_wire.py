"""What OpenAI's clients send, as structs, and the first fault in it in OpenAI's words."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta

from headrace.config import ModelEntry
from headrace.errors import HeadraceError, InvalidParameter, Unsupported
from headrace.http.body import malformed
from headrace.http.openai_nothing import Ignored
from headrace.http.problems import Fault, InvalidBody, Location, dotted, unknown_field
from headrace.served import ServedModel
from headrace.types import Sampling

MOST_TOKENS = 1_000_000
"""Largest `max_tokens` that is cut to the context; what is larger can't be meant, and is refused."""
MOST_MESSAGES = 10_000
MOST_CHOICES = 16

Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopText = Annotated[str, Meta(min_length=1, max_length=4096)]
TokenCount = Annotated[int, Meta(ge=0, le=MOST_TOKENS)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that chat and plain completions share. Null and absent are the same."""

    model: Annotated[str, Meta(description="Default: the server's first model")] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1, description="Ours, not OpenAI's. 0 and -1 are off")] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1, description="Ours, not OpenAI's")] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10, description="Ours, not OpenAI's. 1 is off")] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=4096, description="Token ids, in decimal, to what is added")
        ]
        | None
    ) = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128, description="Ours, not OpenAI's")] | None = None
    min_tokens: Annotated[TokenCount, Meta(description="Ours, not OpenAI's")] | None = None
    max_tokens: Annotated[TokenCount, Meta(description="Cut to what the context leaves; above 1,000,000 it is refused")] | None = None
    ignore_eos: Annotated[bool, Meta(description="Ours, not OpenAI's")] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    cache: Annotated[bool, Meta(description="Ours, not OpenAI's. Keep this answer, even a random one; false: never")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


AskedT = TypeVar("AskedT", bound=Asked)

_PLACE = re.compile(r" - at `\$(.*?)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


def parse(decoder: msgspec.json.Decoder[AskedT], body: bytes) -> AskedT:
    """Raises `InvalidBody` and `UnknownField`, which name the first fault."""
    try:
        asked = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(body, error) from None
    options = asked.stream_options
    if options is not None:
        if options.include_obfuscation:
            raise Unsupported(
                "`stream_options.include_obfuscation`: streams are not padded here.", param="stream_options.include_obfuscation"
            )
        if not asked.stream:
            raise InvalidParameter("`stream_options` is only for `stream: true`.", param="stream_options")
    return asked


def explain(said: str) -> HeadraceError:
    """The decoder's complaint, as an error that names the field."""
    place = _PLACE.search(said)
    loc: Location = ()
    if place is not None:
        said = said[: place.start()]
        steps = ((name, index) for name, index in _STEP.findall(place.group(1)) if index != "...")
        loc = tuple(name or int(index) for name, index in steps)
    if found := _UNKNOWN.fullmatch(said):
        return unknown_field((*loc, _short(found.group(1))))
    if found := _MISSING.fullmatch(said):
        return InvalidBody([Fault((*loc, found.group(1)), "Field required", "missing")])
    return InvalidBody([Fault(loc, _short(said, 200))])


def _short(text: str, length: int = 100) -> str:
    return text if len(text) <= length else text[:length] + "…"


def refuse_nul(text: str, loc: Location) -> None:
    """Raises `InvalidParameter`: no text has U+0000, and what stores and shows text trips over it."""
    if "\0" in text:
        name = dotted(loc)
        raise InvalidParameter(f"`{name}` holds a NUL character (U+0000).", param=name)


def vocabulary(served: ServedModel) -> int | None:
    """Number of token ids; None where only the engine knows."""
    if served.tokenizer is not None:
        return served.tokenizer.vocab_size
    return None if served.card is None else served.card.vocab_size or None


def sampling_of(
    asked: Asked, served: ServedModel, *, max_tokens: int, logprobs: int | None = None, prompt_logprobs: int | None = None
) -> Sampling:
    """How tokens are drawn. Raises `InvalidParameter` for ids outside the vocabulary and for limits that contradict each other."""
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    for text in stop:
        refuse_nul(text, ("stop",))
    size = vocabulary(served)
    stop_ids = tuple(asked.stop_token_ids or ())
    if stop_ids and size is not None and max(stop_ids) >= size:
        raise InvalidParameter(f"Token ids are 0 to {size - 1} for this model; `stop_token_ids` has one outside.", param="stop_token_ids")
    usual = served.entry or _NO_ENTRY
    min_tokens = asked.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidParameter("`min_tokens` is larger than the most tokens to generate.", param="min_tokens")
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=_or(asked.temperature, usual.temperature, 1.0),
        top_p=_or(asked.top_p, usual.top_p, 1.0),
        top_k=max(0, _or(asked.top_k, usual.top_k, 0)),
        min_p=_or(asked.min_p, usual.min_p, 0.0),
        seed=asked.seed,
        presence_penalty=_or(asked.presence_penalty, usual.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, usual.frequency_penalty, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, usual.repetition_penalty, 1.0),
        logit_bias=_bias(asked.logit_bias, size) if asked.logit_bias else {},
        stop=stop,
        stop_token_ids=stop_ids,
        ignore_eos=bool(asked.ignore_eos),
        n=_or(asked.n, None, 1),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


T = TypeVar("T")


def _or(value: T | None, usual: T | None, default: T) -> T:
    """What was asked for, or else what the model's section in the configuration says, or else the default."""
    if value is not None:
        return value
    return default if usual is None else usual


_NO_ENTRY = ModelEntry()


def default_tokens(served: ServedModel, default: int) -> int:
    """`max_tokens` where a request doesn't say."""
    return _or(None, served.entry.max_tokens if served.entry is not None else None, default)


def _bias(asked: dict[str, float], size: int | None) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in asked.items():
        # `isdecimal` alone lets other scripts' digits pass.
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidParameter(f"`logit_bias` takes token ids as keys, and {_short(key, 40)!r} is none.", param="logit_bias")
        token = int(key)
        if size is not None and token >= size:
            raise InvalidParameter(f"Token ids are 0 to {size - 1} for this model; `logit_bias` has {token}.", param="logit_bias")
        biases[token] = bias
    return biases


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ContentPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One part of a message. What parts of other types hold is known, so that they are refused by their type."""

    type: str
    text: str | None = None
    file: Ignored = UNSET
    image_url: Ignored = UNSET
    input_audio: Ignored = UNSET
    prompt_cache_breakpoint: Ignored = UNSET
    refusal: Ignored = UNSET


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(max_length=MOST_MESSAGES)] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    annotations: Ignored = UNSET
    audio: Ignored = UNSET
    function_call: Ignored = UNSET
    refusal: Ignored = UNSET


class ChatCompletionRequest(Asked, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MOST_MESSAGES, examples=[[{"role": "user", "content": "Hello"}]])]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    audio: Ignored = UNSET
    function_call: Ignored = UNSET
    functions: Ignored = UNSET
    metadata: Ignored = UNSET
    modalities: Ignored = UNSET
    moderation: Ignored = UNSET
    parallel_tool_calls: Ignored = UNSET
    prediction: Ignored = UNSET
    prompt_cache_key: Ignored = UNSET
    prompt_cache_options: Ignored = UNSET
    prompt_cache_retention: Ignored = UNSET
    reasoning_effort: Ignored = UNSET
    response_format: Ignored = UNSET
    safety_identifier: Ignored = UNSET
    service_tier: Ignored = UNSET
    store: Ignored = UNSET
    tool_choice: Ignored = UNSET
    tools: Ignored = UNSET
    user: Ignored = UNSET
    verbosity: Ignored = UNSET
    web_search_options: Ignored = UNSET


class CompletionRequest(Asked, kw_only=True):
    prompt: Annotated[
        str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)],
        Meta(description="Text, token ids, or a list of either", examples=["Once upon a time"]),
    ]
    best_of: Annotated[int, Meta(ge=1, le=MOST_CHOICES, description="Only as many as `n`")] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    suffix: Ignored = UNSET
    user: Ignored = UNSET


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
