from __future__ import annotations

from collections.abc import Sequence

import pytest

from headrace.call import Call
from headrace.config import ServerSection
from headrace.errors import ContextLengthExceeded, InvalidParameter, ModelNotFound, TooManyTokens, Unsupported
from headrace.policies.prepare import Prepare, fit
from headrace.served import ServedModel, ServedModels
from headrace.types import EngineCard, Message, ModelFiles, Sampling

pytestmark = pytest.mark.anyio


class Letters:
    """A token a character, for tests of counting."""

    vocab_size = 128
    bos_ids = (1,)
    eos_ids = frozenset({2})

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        if limit is not None and len(text) > 10 * limit:
            raise TooManyTokens(limit + 1)
        return [ord(c) for c in text]


class Plain:
    def __init__(self, tokenizer: Letters) -> None:
        self._tokenizer = tokenizer

    def encode(self, messages: Sequence[Message], *, limit: int | None = None) -> list[int]:
        return self._tokenizer.encode("".join(m.content for m in messages), limit=limit)


CARD = EngineCard(
    model="m",
    kind="openvino",
    context_length=16,
    vocab_size=128,
    fingerprint="",
    capabilities=frozenset({"tokens", "logprobs", "min_tokens"}),
)


def models(**changes: object) -> ServedModels:
    tokenizer = Letters()
    fields: dict[str, object] = {"tokenizer": tokenizer, "template": Plain(tokenizer), "card": CARD, **changes}
    files = ModelFiles(name="m", kind="openvino", aliases=("alias",), context_length=16)
    return ServedModels([ServedModel(files, engine=None, **fields)])  # type: ignore[arg-type]


def call(**changes: object) -> Call:
    fields: dict[str, object] = {"id": "r", "route": "/chat", "model": None, "sampling": Sampling(max_tokens=4), **changes}
    return Call(**fields)  # type: ignore[arg-type]


async def prepared(call: Call, served: ServedModels | None = None) -> Call:
    async with Prepare(served or models(), ServerSection(request_timeout=50))(call):
        pass
    return call


async def test_text_gets_the_models_bos_and_messages_the_template() -> None:
    assert (await prepared(call(text="ab"))).request.prompt == [1, 97, 98]  # type: ignore[union-attr]
    asked = await prepared(call(messages=(Message(role="user", content="ab"),), model="alias", timeout=3.0))
    assert asked.request is not None
    assert (asked.request.prompt, asked.request.timeout, asked.served_model) == ([97, 98], 3.0, "m")


async def test_the_servers_timeout_is_the_ceiling() -> None:
    asked = await prepared(call(text="a", timeout=1e9))
    assert asked.request is not None
    assert asked.request.timeout == 50


async def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    asked = await prepared(call(tokens=[5] * 10, sampling=Sampling(max_tokens=1000, min_tokens=20)))
    assert asked.request is not None
    assert (asked.request.sampling.max_tokens, asked.request.sampling.min_tokens) == (6, 6)


@pytest.mark.parametrize(("tokens", "max_tokens"), [(16, 1), (17, 0), (40, 4)])
async def test_a_prompt_that_leaves_no_room_is_refused_with_both_counts(tokens: int, max_tokens: int) -> None:
    with pytest.raises(ContextLengthExceeded, match=f"16 tokens.* {tokens}"):
        await prepared(call(tokens=[5] * tokens, sampling=Sampling(max_tokens=max_tokens)))


async def test_scoring_alone_may_fill_the_context() -> None:
    assert fit(call(tokens=[5] * 16, sampling=Sampling(max_tokens=0)), 16, 16).max_tokens == 0


async def test_counting_that_stopped_early_says_at_least() -> None:
    with pytest.raises(ContextLengthExceeded, match="at least 17") as caught:
        await prepared(call(text="x" * 9000))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("tokens", [[128], [-1], [5, 10**9]])
async def test_token_ids_outside_the_vocabulary_are_refused(tokens: list[int]) -> None:
    with pytest.raises(InvalidParameter, match="0 to 127"):
        await prepared(call(tokens=tokens))


async def test_unknown_models_are_answered_with_those_that_exist() -> None:
    with pytest.raises(ModelNotFound, match="m, alias"):
        await prepared(call(text="a", model="gpt-4"))


async def test_what_the_engine_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="seed") as caught:
        await prepared(call(text="a", sampling=Sampling(max_tokens=1, seed=3, logprobs=2)))
    assert caught.value.param == "seed"


async def test_a_model_without_a_template_has_no_chat() -> None:
    with pytest.raises(Unsupported, match="chat template"):
        await prepared(call(messages=(Message(role="user", content="a"),)), models(template=None))


async def test_an_engine_that_templates_itself_gets_messages_and_no_tokens() -> None:
    served = models(tokenizer=None, template=None)
    turn = (Message(role="user", content="a"),)
    asked = await prepared(call(messages=turn), served)
    assert asked.request is not None
    assert (asked.request.messages, asked.request.prompt) == (turn, [])
    with pytest.raises(Unsupported, match="token ids"):
        await prepared(call(tokens=[1]), served)
