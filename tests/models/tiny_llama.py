"""A random Llama of a few thousand parameters, as transformers would have saved it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from headrace.models.byte_tokenizer import CHATML

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(CONTROL)
HIDDEN, INNER, LAYERS, HEADS = 64, 128, 2, 4


def byte_level_tokenizer() -> dict[str, object]:
    """Byte-level BPE without merges: the simplest tokenizer.json of the usual kind."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 256 + index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, name in enumerate(CONTROL)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {character: index for index, character in enumerate(alphabet)}, "merges": []},
    }


def write_tiny_llama(folder: Path, *, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "torch_dtype": "float32",
    }
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROL[0],
        "eos_token": CONTROL[2],
        "chat_template": CHATML,
        "model_max_length": 256,
        "add_bos_token": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer()))
    write_safetensors(folder / "model.safetensors", _weights(seed))


def _weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        shapes |= {
            name + "input_layernorm.weight": (HIDDEN,),
            name + "post_attention_layernorm.weight": (HIDDEN,),
            name + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            name + "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            name + "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            name + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            name + "mlp.gate_proj.weight": (INNER, HIDDEN),
            name + "mlp.up_proj.weight": (INNER, HIDDEN),
            name + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else random.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """https://github.com/huggingface/safetensors#format"""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)
