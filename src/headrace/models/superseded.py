"""Names that older tutorials use, of models that bring their own Python code, and what takes their place today."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headrace.models import catalog


@dataclass(frozen=True, slots=True)
class Superseded:
    """A model that can be had only with `trust_remote_code`."""

    id: str
    instead: str
    """The catalog's name of the model to take."""

    @property
    def advice(self) -> str:
        """What it needs, and what to do instead."""
        entry = catalog.find(self.instead)
        size = f" ({entry.size / 1e9:.1f} GB)" if entry else ""
        return (
            f"{self.id} brings its own Python code, which this server runs only with trust_remote_code = true in its configuration "
            f"(HEADRACE_TRUST_REMOTE_CODE=true) and the engine transformers (headrace[transformers]); the code was written for "
            f"transformers 4, and may not run today. In its place take {self.instead}{size}: `headrace serve {self.instead}`."
        )


_INSTEAD = {
    "qwen/qwen-1_8b": "qwen3-1.7b",
    "qwen/qwen-7b": "qwen3-8b",
    "qwen/qwen-14b": "qwen3-14b",
    "qwen/qwen-72b": "qwen3-32b",
    "thudm/chatglm-6b": "glm-4-9b",
    "thudm/chatglm2-6b": "glm-4-9b",
    "thudm/chatglm2-6b-32k": "glm-4-9b",
    "thudm/chatglm3-6b": "glm-4-9b",
    "thudm/chatglm3-6b-base": "glm-4-9b",
    "thudm/chatglm3-6b-32k": "glm-4-9b",
    "thudm/chatglm3-6b-128k": "glm-4-9b",
    "thudm/glm-4-9b-chat": "glm-4-9b",
    "baichuan-inc/baichuan-13b": "qwen3-14b",
    "baichuan-inc/baichuan2-7b": "qwen3-8b",
    "baichuan-inc/baichuan2-13b": "qwen3-14b",
    "internlm/internlm-chat-7b": "qwen3-8b",
    "internlm/internlm2-chat-7b": "qwen3-8b",
    "internlm/internlm2_5-7b": "qwen3-8b",
}
_OWNERS = {"zhipuai": "thudm", "zai-org": "thudm", "shanghai_ai_laboratory": "internlm"}
"""Further names of the same owners, on either hub and over the years."""
_VARIANT = re.compile(r"(-chat)?(-int[48])?$")


def find(name: str) -> Superseded | None:
    """The repository `OWNER/NAME`, or `NAME` alone, if it is one of these; case doesn't matter, as on the hubs."""
    owner, slash, model = name.lower().rpartition("/")
    names = model, _VARIANT.sub("", model, count=1)
    for known, instead in _INSTEAD.items():
        whose, _, what = known.partition("/")
        if what in names and (not slash or _OWNERS.get(owner, owner) == whose):
            return Superseded(name, instead)
    return None
