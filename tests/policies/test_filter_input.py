from __future__ import annotations

import asyncio
import time

import pytest

from headrace.call import Call
from headrace.config import FilterSection
from headrace.errors import ConfigError, ContentRefused, HeadraceError, InvalidParameter, Unsupported
from headrace.policies.filter_input import filter_input_steps, filter_steps
from headrace.served import ServedModel, ServedModels
from headrace.types import Message, ModelFiles, Sampling

pytestmark = pytest.mark.anyio

COUNTED: list[tuple[str, str, str]] = []


@pytest.fixture(autouse=True)
def _nothing_counted() -> None:
    COUNTED.clear()


def new_call(prompt: str | list[int] | tuple[Message, ...]) -> Call:
    call = Call(id="r", route="/chat", model=None, sampling=Sampling(max_tokens=1))
    if isinstance(prompt, str):
        call.text = prompt
    elif isinstance(prompt, list):
        call.tokens = prompt
    else:
        call.messages = prompt
    return call


async def passed(prompt: str | list[int] | tuple[Message, ...], *, models: ServedModels | None = None, **settings: object) -> Call:
    section = FilterSection.model_validate(settings)
    (step,) = filter_steps(section, models=models)
    call = new_call(prompt)
    try:
        async with step(call):
            return call
    finally:
        COUNTED.extend(call.filtered)


async def refused(kind: type[HeadraceError], prompt: str | list[int] | tuple[Message, ...], **settings: object) -> HeadraceError:
    with pytest.raises(kind) as caught:
        await passed(prompt, **settings)  # type: ignore[arg-type]
    return caught.value


async def test_too_many_characters_are_refused_with_both_counts() -> None:
    messages = (Message(role="system", content="x" * 6), Message(role="user", content="y" * 5))
    error = await refused(InvalidParameter, messages, filter_input_max_chars=10)
    assert "11 characters" in error.message
    assert "10" in error.message
    assert error.param == "messages"
    assert (await passed("x" * 10, filter_input_max_chars=10)).text == "x" * 10


async def test_control_characters_are_refused_or_stripped() -> None:
    text = "a\x00b\x1b[1m\tc\r\nd\x7f\x85é"
    assert (await passed(text, filter_control_characters="strip")).text == "ab[1m\tc\r\ndé"
    error = await refused(InvalidParameter, text, filter_control_characters="refuse")
    assert error.param == "prompt"
    assert (await passed("a\tb\n", filter_control_characters="refuse")).text == "a\tb\n"


async def test_stripping_comes_before_the_words_so_that_it_hides_none() -> None:
    await refused(ContentRefused, "sec\x00ret", filter_control_characters="strip", deny_input=["secret"])


@pytest.mark.parametrize("settings", [{"deny_input": ["Secret", "绝密"]}, {"deny_input_patterns": [r"(?i)secret\d*", "绝密.*件"]}])
@pytest.mark.parametrize("prompt", ["my SECRET", "这是绝密文件", "x" * 10_000 + "secret42"])
async def test_denied_prompts_are_refused_in_any_field(settings: dict[str, object], prompt: str) -> None:
    error = await refused(ContentRefused, prompt, **settings)
    assert (error.status, error.code) == (400, "content_filter")
    assert "ecret" not in error.message
    assert COUNTED == [("input", "deny", "refuse")]
    await refused(ContentRefused, (Message(role="user", content="hi"), Message(role="user", content=prompt)), **settings)
    await refused(ContentRefused, (Message(role="user", content="hi", name=prompt),), **settings)
    calls = ({"id": "1", "function": {"name": "f", "arguments": f'{{"x": "{prompt}"}}'}},)
    await refused(ContentRefused, (Message(role="assistant", content="", tool_calls=calls),), **settings)
    assert (await passed("my sec ret", **settings)).text == "my sec ret"


async def test_personal_data_is_masked_in_every_field_before_the_model_sees_it() -> None:
    calls = ({"id": "1", "function": {"arguments": "to a@b.co", "list": ["13812345678", 5]}},)
    messages = (
        Message(role="user", content="card 4111 1111 1111 1111.", name="bob"),
        Message(role="assistant", content="", tool_calls=calls),
    )
    call = await passed(messages, pii_input="mask", filter_mask="[removed]", report_filters=True)
    assert call.messages is not None
    assert call.messages[0] == Message(role="user", content="card [removed].", name="bob")
    assert call.messages[1].tool_calls == ({"id": "1", "function": {"arguments": "to [removed]", "list": ["[removed]", 5]}},)
    assert calls[0]["function"]["arguments"] == "to a@b.co"  # type: ignore[index]
    assert COUNTED == [("input", "card", "mask"), ("input", "email", "mask"), ("input", "phone", "mask")]
    assert call.notes == {"X-Headrace-Filter": "card=1,email=1,phone=1"}


async def test_personal_data_is_refused_where_so_configured() -> None:
    error = await refused(ContentRefused, "mail a@b.co", pii_input="refuse")
    assert "email" in error.message
    assert "a@b.co" not in error.message
    assert (await passed("mail a@b.co", pii_input="refuse", pii_kinds=["card"])).text == "mail a@b.co"


class Letters:
    """Token ids are code points."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


async def test_token_ids_are_checked_as_text_and_never_masked() -> None:
    model = ServedModel(files=ModelFiles(name="m", kind="echo"), engine=None, tokenizer=Letters())  # type: ignore[arg-type]
    models = ServedModels([model])
    tokens = [ord(character) for character in "mail a@b.co"]
    await refused(ContentRefused, tokens, models=models, deny_input=["MAIL"])
    await refused(ContentRefused, tokens, models=models, pii_input="mask")
    await refused(InvalidParameter, tokens, models=models, filter_input_max_chars=5)
    assert (await passed(tokens, models=models, deny_input=["xyz"])).tokens == tokens
    await refused(Unsupported, tokens, deny_input=["xyz"])


@pytest.mark.parametrize("pattern", ["(?=a)", "(", r"(a)\1"])
async def test_patterns_that_re2_does_not_know_stop_the_start(pattern: str) -> None:
    with pytest.raises(ConfigError, match="deny_input_patterns"):
        filter_input_steps(FilterSection(deny_input_patterns=(pattern,)))


async def test_a_hostile_mebibyte_is_checked_beside_the_event_loop_in_less_than_a_second() -> None:
    (step,) = filter_steps(
        FilterSection(
            deny_input=("secret",), deny_input_patterns=(r"(a*)*(b|c)*d$", "(x+x+)+y"), pii_input="mask", filter_control_characters="strip"
        )
    )
    # With an address at its end, or a quick look would be enough.
    call = new_call("ax" * 2**18 + "a@b." * 2**17 + " a@b.com")
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            # Not for a time: a busy machine would count few, whoever holds the loop.
            await asyncio.sleep(0)

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0)
    start = time.process_time()
    async with step(call):
        spent = time.process_time() - start
    beating.cancel()
    assert spent < 1.5
    assert beats > 5
