"""A GGUF file's weights unpacked, as transformers would have saved them: bf16 safetensors, with the tokenizer and its template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from headrace.models.card import read_card


def unpack(gguf: Path, served: Path, folder: Path) -> Path:
    """Fill the new `folder` from the GGUF file and the model folder that Headrace converted it to; gives `folder`.

    The weights are dequantized by transformers itself and rounded to bfloat16. Takes seconds for 135M parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    exact = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=exact, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    shutil.copyfile(served / "tokenizer.json", folder / "tokenizer.json")
    card = read_card(served)
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": card.bos_token,
        "eos_token": card.eos_token,
        "chat_template": card.chat_template,
        "model_max_length": card.context_length,
        "add_bos_token": bool(card.bos_ids),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words, ensure_ascii=False))
    return folder


def without_end(folder: Path, twin: Path) -> Path:
    """The same weights without an end-of-text token, in the new folder `twin`: for servers that can't be asked to ignore it."""
    twin.mkdir()
    for path in folder.iterdir():
        if path.name in ("config.json", "generation_config.json"):
            settings = json.loads(path.read_text())
            settings.pop("eos_token_id", None)
            (twin / path.name).write_text(json.dumps(settings))
        else:
            (twin / path.name).symlink_to(path)
    return twin
