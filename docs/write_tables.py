"""Writes the configuration table into both READMEs from src/headrace/config.py: `python docs/write_tables.py`.

Names, variables and defaults come from the code, and so does the English description; a Chinese one stays as the table has it, and begins
as the English one for a setting that is new. tests/test_readme.py fails while a table is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from headrace.cli.sources import environment_names
from headrace.config import sections
from headrace.models.engine_choice import table as engine_table

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- configuration table: written by docs/write_tables.py -->\n"
END = "<!-- end of configuration table -->\n"
READMES = {"README.md": ("setting", "environment", "default", "what it does"), "README.zh-CN.md": ("配置项", "环境变量", "默认值", "说明")}
ENGINES_BEGIN = "<!-- engine table: written by docs/write_tables.py -->\n"
ENGINES_END = "<!-- end of engine table -->\n"
_CHINESE = {
    "OpenVINO folder": "OpenVINO 文件夹",
    "quantized Transformers folder": "已量化的 Transformers 文件夹",
    "Transformers folder": "Transformers 文件夹",
    "GGUF file": "GGUF 文件",
    "the same, with recurrent layers": "同上，含循环层",
    "CPU, with `[convert]`": "CPU，装有 `[convert]`",
    "CPU, with `[transformers]`, without `[convert]`": "CPU，装有 `[transformers]`，没有 `[convert]`",
    "one GPU or several, with `[transformers]`": "一块或多块 GPU，装有 `[transformers]`",
    "several GPUs, with `[vllm]`": "多块 GPU，装有 `[vllm]`",
}
_ROW = re.compile(r"^\| `(\w+)` \|.*\| (.*) \|$", re.MULTILINE)


def rewritten(name: str, text: str) -> str:
    """The README's text with fresh tables."""
    return with_engines(name, _with_settings(name, text))


def with_engines(name: str, text: str) -> str:
    """The text with a fresh table of engines, which `headrace.models.engine_choice` decides."""
    before, _, rest = text.partition(ENGINES_BEGIN)
    _, _, after = rest.partition(ENGINES_END)
    engines = engine_table()
    if name == "README.zh-CN.md":
        for english in sorted(_CHINESE, key=len, reverse=True):
            engines = engines.replace(english, _CHINESE[english])
    return before + ENGINES_BEGIN + engines + ENGINES_END + after


def _with_settings(name: str, text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    described = {} if name == "README.md" else dict(_ROW.findall(old))
    return before + BEGIN + table(READMES[name], described) + END + after


def table(heading: tuple[str, ...], described: dict[str, str]) -> str:
    rows = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    for section in sections().values():
        for field, info in section.model_fields.items():
            variables = ", ".join(f"`{variable}`" for variable in environment_names(field))
            text = described.get(field) or (info.description or "").replace("|", "\\|")
            rows.append(f"| `{field}` | {variables} | {_shown(info.default)} | {text} |")
    return "\n".join(rows) + "\n"


def _shown(default: Any) -> str:
    if default is None or default is PydanticUndefined or default == ():
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def main() -> None:
    for name in READMES:
        path = ROOT / name
        path.write_text(rewritten(name, path.read_text(encoding="utf-8")), encoding="utf-8")
    path = ROOT / "docs" / "engines.md"
    path.write_text(with_engines("docs/engines.md", path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
