"""What the native routes take and give, as the tutorial has it; also what `/docs` shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from headrace.config import ModelEntry
from headrace.http.problems import Fault, InvalidBody, Location
from headrace.types import Message, Sampling

MOST_TOKENS = 1_000_000
"""Largest `max_length` that is cut to the context; what is larger can't be meant, and is refused."""
MOST_TURNS = 10_000
MOST_FIELDS = 64
"""Fields of an object, and so faults found in it; no object here has nearly as many."""
MOST_FAULTS = 16


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("A text can't hold a NUL character (U+0000)")
    return text


_USUAL = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty")


Text = Annotated[str, AfterValidator(_no_nul)]
StopText = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_nul)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Turn(_Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text


Pair = Annotated[list[Text], Field(min_length=2, max_length=2)]


def _history_shape(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    return "[messages]" if isinstance(first, dict | Turn) else "[pairs]"


History = Annotated[
    Annotated[list[Pair], Field(fail_fast=True, max_length=MOST_TURNS), Tag("[pairs]")]
    | Annotated[list[Turn], Field(fail_fast=True, max_length=MOST_TURNS), Tag("[messages]")],
    Discriminator(_history_shape),
]


class ChatQuestion(_Wire):
    """One question, with what was said before."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "Hello, who are you?", "max_length": 128, "temperature": 0.7},
                {"prompt": "And in winter?", "history": [["What is the weather like in spring?", "It is mild."]]},
                {"prompt": "Go on", "history": [{"role": "user", "content": "Tell a story"}, {"role": "assistant", "content": "Once"}]},
            ]
        }
    )
    prompt: Annotated[str, Field(min_length=1, description="What to answer", examples=["Hello, who are you?"]), AfterValidator(_no_nul)]
    max_length: int = Field(512, ge=1, le=MOST_TOKENS, description="Most tokens to generate; cut to what the context leaves")
    temperature: float = Field(0.7, ge=0, le=2, description="0 always takes the likeliest token")
    history: History | None = Field(
        None, description="What was said before: [user, assistant] pairs, or messages with role and content; comes back in the same shape"
    )
    model: str | None = Field(None, description="Default: the server's first model")
    top_p: float | None = Field(None, ge=0, le=1, description="Draw from the likeliest tokens that make up this much probability")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="The same request with the same seed gives the same text")
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=4)] | None = Field(
        None, description="Texts that end the answer"
    )
    system: Text | None = Field(None, description="Becomes the first message, with the role system")
    cache: bool | None = Field(None, description="Keep this answer and give it again, even if it is a random one; false: never")

    def sampling(self, usual: ModelEntry | None = None) -> Sampling:
        """`usual`: the model's section in the configuration, for what the question doesn't say."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        said = Sampling(
            max_tokens=self.max_length,
            temperature=self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=stop,
        )
        if usual is None:
            return said
        ours = {"max_length": "max_tokens"}
        silent = {field: getattr(usual, field) for field in _USUAL if field not in {ours.get(name, name) for name in self.model_fields_set}}
        return msgspec.structs.replace(said, **{field: value for field, value in silent.items() if value is not None})

    def messages(self) -> tuple[Message, ...]:
        messages = [] if self.system is None else [Message(role="system", content=self.system)]
        for turn in self.history or ():
            if isinstance(turn, Turn):
                messages.append(Message(role=turn.role, content=turn.content))
            else:
                messages += (Message(role="user", content=turn[0]), Message(role="assistant", content=turn[1]))
        messages.append(Message(role="user", content=self.prompt))
        return tuple(messages)

    def history_with(self, response: str) -> list[Any]:
        """The history in the shape it was given, this turn added."""
        given = self.history or []
        if given and isinstance(given[0], Turn):
            turns: list[Any] = [{"role": turn.role, "content": turn.content} for turn in given if isinstance(turn, Turn)]
            return [*turns, {"role": "user", "content": self.prompt}, {"role": "assistant", "content": response}]
        return [*given, [self.prompt, response]]


class ChatReply(BaseModel):
    response: str = Field(examples=["I am a small language model."])
    history: list[Any] = Field(examples=[[["Hello, who are you?", "I am a small language model."]]])
    tokens_used: int = Field(description="Tokens of the prompt and of the response together", examples=[42])
    processing_time: float = Field(description="Seconds", examples=[0.31])
    model: str = Field(examples=["smollm2-135m-instruct"])
    finish_reason: Literal["stop", "length"]


class FailedItem(BaseModel):
    error: dict[str, Any] = Field(
        examples=[{"status": 422, "code": "invalid_request", "message": "prompt: String should have at least 1 character"}]
    )


class BatchReply(BaseModel):
    results: list[ChatReply | FailedItem]


class NativeError(BaseModel):
    detail: str = Field(examples=["There is no model 'x' here; there is smollm2-135m-instruct."])
    code: str = Field(examples=["model_not_found"])


class FieldFault(BaseModel):
    loc: list[str | int] = Field(examples=[["body", "prompt"]])
    msg: str = Field(examples=["Field required"])
    type: str = Field(examples=["missing"])


class InvalidFields(BaseModel):
    detail: list[FieldFault]


class TokenizeQuestion(_Wire):
    """A text, or a conversation as the model's template writes it; one of the two."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Hello"}, {"messages": [{"role": "user", "content": "Hello"}]}]})
    text: Text | None = Field(None, description="Plain text: control tokens typed into it stay text")
    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1, max_length=MOST_TURNS)] | None = None
    model: str | None = None


class TokenizeReply(BaseModel):
    tokens: list[int] = Field(examples=[[19556]])
    count: int = Field(examples=[1])


class DetokenizeQuestion(_Wire):
    tokens: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(fail_fast=True)] = Field(examples=[[19556]])
    model: str | None = None


class DetokenizeReply(BaseModel):
    text: str = Field(examples=["Hello"])


WireT = TypeVar("WireT", bound=BaseModel)


def validated(kind: type[WireT], data: Any, place: Location = ()) -> WireT:
    """Raises `InvalidBody` with FastAPI's words for the faults, the first `MOST_FAULTS` of them."""
    _refuse_crowds(data, place)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InvalidBody([_fault(each, place) for each in error.errors(include_url=False, include_context=False)[:MOST_FAULTS]]) from None


def _refuse_crowds(data: Any, place: Location) -> None:
    """Objects with very many fields: each would be a fault of its own, and telling 200,000 of them takes a second."""
    if isinstance(data, dict):
        inner = [each for value in data.values() if isinstance(value, list) for each in value if isinstance(each, dict)]
        if max(map(len, (data, *inner))) > MOST_FIELDS:
            raise InvalidBody([Fault(place, f"An object has more than {MOST_FIELDS} fields", "too_long")])


def _fault(error: Any, place: Location) -> Fault:
    # Where a field may be one of several types pydantic adds the type's own description, which is no place in the body.
    unknown = error["type"] == "extra_forbidden"  # the caller's own name, whatever is in it
    parts = [part for part in error["loc"] if isinstance(part, int) or unknown or "[" not in part]
    loc = tuple(part if isinstance(part, int) else part[:100] for part in parts)
    message: str = error["msg"]
    return Fault((*place, *loc), message[:300].removeprefix("Value error, "), error["type"], _shown(error["input"]))


def _shown(value: Any) -> Any:
    """The input, if it is small and plain: what is large or secret is not sent back."""
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else None
    return value if isinstance(value, str) and len(value) <= 100 else None
