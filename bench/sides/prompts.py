"""The prompts of one round, as token ids: the same for every side, no two alike in any round."""

from __future__ import annotations

from headrace.cli.load import make_prompts
from headrace.models.template import load_template
from headrace.models.tokenizer import load_tokenizer
from headrace.types import Message, ModelFiles

WORDS = 75
"""`make_prompts` is asked for so many tokens, which the chat template makes about 102 of."""


def texts(count: int, number: int, tokens: int = WORDS) -> list[str]:
    """`count` prompts for the round `number`."""
    return make_prompts(count, tokens=tokens, seed=1_000 + number)


def token_ids(files: ModelFiles, prompts: list[str]) -> list[list[int]]:
    """The prompts as the server would hand them to the engine: through the chat template, if the model has one."""
    template = load_template(files)
    if template is not None:
        return [template.encode((Message(role="user", content=text),)) for text in prompts]
    tokenizer = load_tokenizer(files)
    return [[*tokenizer.bos_ids, *tokenizer.encode(text)] for text in prompts]
