from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import BadRequest, ModelError, TooManyTokens
from headrace.models.byte_tokenizer import CHATML, ByteTokenizer
from headrace.models.template import JinjaTemplate, load_template
from headrace.models.tokenizer import load_tokenizer
from headrace.types import Message, ModelFiles
from models.words import ADDED, small_tokenizer

STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '[' + message['role'] + '] ' + message['content'] | trim + eos_token }}{% endfor %}"
)
BARE = "{% for message in messages %}{{ message.name }}{{ message.content }}{{ message.tool_call_id }}{% endfor %}{{ '<|im_end|>' }}"
TOOLS = (
    "{% for message in messages %}{{ message.content }}{% for call in message.tool_calls %}{{ '<tool_call>' }}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)

# Words from which control tokens could be put together.
scraps = st.lists(
    st.one_of(
        st.sampled_from([name for name, _ in ADDED]),
        st.sampled_from([name[:cut] for name, _ in ADDED for cut in range(1, len(name))]),
        st.sampled_from([name[cut:] for name, _ in ADDED for cut in range(1, len(name))]),
        st.sampled_from(["\n", " ", "\U0010c4a5", "{{ 7 * 7 }}", "{% raw %}", "[user]"]),
        st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    ),
    max_size=6,
).map("".join)
roles = st.lists(st.sampled_from(["system", "developer", "user", "assistant", "tool"]), min_size=1, max_size=5)


def controls(tokens: list[int]) -> list[int]:
    known = {token.id for token in small_tokenizer().controls.values()}
    return [token for token in tokens if token in known]


def shown(source: str, *messages: Message, **names: str) -> str:
    return small_tokenizer().decode(JinjaTemplate(source, small_tokenizer(), **names).encode(messages))


chatml = JinjaTemplate(CHATML, small_tokenizer())
bare = JinjaTemplate(BARE, small_tokenizer())
tools = JinjaTemplate(TOOLS, small_tokenizer())


def test_a_conversation_becomes_the_text_that_jinja_makes_of_it() -> None:
    text = shown(CHATML, Message(role="system", content="Be brief."), Message(role="user", content=" Hi <b>there</b>! "))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <b>there</b>! <|im_end|>\n<|im_start|>assistant\n"


@given(roles, st.data())
def test_control_tokens_depend_on_the_roles_alone(said: list[str], data: st.DataObject) -> None:
    harmless = [Message(role=role, content="a") for role in said]
    hostile = [Message(role=role, content=data.draw(scraps)) for role in said]
    assert controls(chatml.encode(hostile)) == controls(chatml.encode(harmless))


@given(st.lists(st.tuples(scraps, scraps, scraps), min_size=1, max_size=4))
def test_fields_side_by_side_make_no_control_token(fields: list[tuple[str, str, str]]) -> None:
    messages = [Message(role="user", name=name, content=content, tool_call_id=call) for name, content, call in fields]
    tokens = bare.encode(messages)
    assert controls(tokens) == [small_tokenizer().controls["<|im_end|>"].id]
    assert small_tokenizer().decode(tokens) == "".join("".join(field) for field in fields) + "<|im_end|>"


@given(st.dictionaries(scraps, st.one_of(scraps, st.lists(scraps, max_size=2)), max_size=3), scraps)
def test_tool_calls_make_no_control_token(arguments: dict[str, object], name: str) -> None:
    import json

    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    tokens = tools.encode([Message(role="assistant", content="", tool_calls=(call,))])
    assert controls(tokens) == [small_tokenizer().controls["<tool_call>"].id]
    assert small_tokenizer().decode(tokens) == f"<tool_call>{name} {json.dumps(arguments, ensure_ascii=False)}"


@given(scraps)
def test_words_come_through_as_they_were_typed(content: str) -> None:
    text = small_tokenizer().decode(chatml.encode([Message(role="user", content=content)]))
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_trimming_works_as_ever() -> None:
    assert shown(STRICT, Message(role="user", content="  hi <|im_end|> "), bos_token="<|endoftext|>", eos_token="<|im_end|>") == (
        "<|endoftext|>[user] hi <|im_end|><|im_end|>"
    )


def test_a_refusal_carries_the_templates_own_words() -> None:
    template = JinjaTemplate(STRICT, small_tokenizer())
    with pytest.raises(BadRequest, match="roles must alternate"):
        template.encode([Message(role="user", content="a"), Message(role="user", content="b")])


def test_unknown_roles_are_refused() -> None:
    for role in ("im_start", "<|im_start|>", "", "x" * 10_000):
        with pytest.raises(BadRequest):
            chatml.encode([Message(role=role, content="a")])


def test_developer_is_system_where_the_template_knows_no_developer() -> None:
    assert shown(CHATML, Message(role="developer", content="a")).startswith("<|im_start|>system\na")
    knows = CHATML + "{# developer #}"
    assert shown(knows, Message(role="developer", content="a")).startswith("<|im_start|>developer\na")


def test_thoughts_in_the_history_are_left_out_where_the_template_does_so() -> None:
    source = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    text = shown(source, Message(role="user", content="a</think>b"), Message(role="assistant", content="<think>why</think>c"))
    assert text.startswith("<|im_start|>user\na</think>b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>")


def test_control_tokens_take_white_space_along_where_the_tokenizer_says_so() -> None:
    class Stripping(ByteTokenizer):
        @property
        def controls(self):  # type: ignore[no-untyped-def]
            from headrace.models.control_tokens import ControlToken

            return {**super().controls, "<|im_end|>": ControlToken(258, lstrip=True, rstrip=True)}

    tokens = JinjaTemplate("{{ messages[0].content }} <|im_end|>\n\n x", Stripping()).encode([Message(role="user", content="a")])
    assert tokens == [ord("a"), 258, ord("x")]


@given(roles, st.integers(1, 400), st.integers(1, 300))
def test_the_limit_holds_and_reports_a_true_lower_bound(said: list[str], length: int, limit: int) -> None:
    messages = [Message(role=role, content="word " * length) for role in said]
    count = len(chatml.encode(messages))
    if count <= limit:
        assert len(chatml.encode(messages, limit=limit)) == count
    else:
        with pytest.raises(TooManyTokens) as refused:
            chatml.encode(messages, limit=limit)
        assert limit < refused.value.at_least <= count


@pytest.mark.parametrize("unit", ["x", "<", "<|im_start|>", "🎉", "<|im_star"])
@pytest.mark.alone
def test_an_endless_conversation_is_refused_at_once(unit: str) -> None:
    messages = [Message(role="user", content=unit * (2**20 // len(unit.encode()))) for _ in range(8)]
    begun = time.perf_counter()
    with pytest.raises(TooManyTokens):
        chatml.encode(messages, limit=8192)
    assert time.perf_counter() - begun < 0.5


def test_sentinels_in_every_message_are_no_way_in() -> None:
    private = "".join(map(chr, range(0x10C400, 0x10C500)))
    text = shown(CHATML, Message(role="user", content=private + "<|im_\U0010c4a5end|>"))
    assert private + "<|im_\U0010c4a5end|>" in text


def test_echo_has_a_template_and_a_base_model_none(tmp_path) -> None:  # type: ignore[no-untyped-def]
    template = load_template(ModelFiles(name="echo", kind="echo"))
    assert template is not None
    assert template.encode([Message(role="user", content="<|im_end|>")])[:6] == [257, *b"user\n"]
    assert load_template(ModelFiles(name="r", kind="remote", url="http://localhost")) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_template(ModelFiles(name="base", kind="openvino", folder=str(tmp_path))) is None


def test_broken_templates_refuse_the_start() -> None:
    for source in ("{% for %}", "{{ raise_exception('never') }}", "{{ nothing.at.all }}"):
        with pytest.raises(ModelError):
            JinjaTemplate(source, small_tokenizer())


@pytest.mark.slow
def test_the_default_models_prompt_equals_openvinos(default_model: ModelFiles) -> None:
    import openvino_genai

    reference = openvino_genai.Tokenizer(default_model.folder)
    tokenizer, template = load_tokenizer(default_model), load_template(default_model)
    assert template is not None
    for roles_said in (["user"], ["system", "user"], ["user", "assistant", "user"]):
        messages = [Message(role=role, content=f"words of {role}, 你好 🎉") for role in roles_said]
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = reference.apply_chat_template(chat, add_generation_prompt=True)
        assert tokenizer.decode(template.encode(messages)) == text
        assert template.encode(messages) == reference.encode(text, add_special_tokens=False).input_ids.data[0].tolist()


@pytest.mark.slow
def test_a_short_chat_is_cheap(default_model: ModelFiles) -> None:
    template = load_template(default_model)
    assert template is not None
    said = ("You are a helpful assistant.", "What is the capital of France?", "Paris.", "And of Germany?")
    messages = [Message(role=role, content=text) for role, text in zip(("system", "user", "assistant", "user"), said, strict=True)]
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        template.encode(messages, limit=8192)
        times.append(time.perf_counter() - begun)
    assert sorted(times)[len(times) // 2] < 400e-6
