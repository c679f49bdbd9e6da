"""The default model in the transformers implementation, in float32: what the engine's results are held against.

Its weights and hyperparameters are the GGUF file's own, as the `gguf` package dequantizes them. Given the served
OpenVINO model's matrices, decompressed, instead of the file's, only the computing differs, and can be held to a
thousandth. (test_served_weights.py bounds how far the two are apart.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrices = dict[str, NDArray[np.float32]]
GgufModel = tuple[dict[str, Any], Matrices]
"""Hyperparameters, and the weights by their names in transformers."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Reference:
    """Over the hyperparameters and weights that `read_gguf` gives; it keeps the arrays and changes none."""

    def __init__(self, metadata: dict[str, Any], weights: Matrices) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.initialization import no_init_weights

        config = LlamaConfig(
            vocab_size=metadata["vocab_size"],
            hidden_size=metadata["embedding_length"],
            intermediate_size=metadata["feed_forward_length"],
            num_hidden_layers=metadata["block_count"],
            num_attention_heads=metadata["attention.head_count"],
            num_key_value_heads=metadata["attention.head_count_kv"],
            max_position_embeddings=metadata["context_length"],
            rms_norm_eps=metadata["attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": metadata["rope.freq_base"]},
            tie_word_embeddings=True,
            dtype="float32",
        )
        self._torch = torch
        with no_init_weights():
            self._model = LlamaForCausalLM(config).eval()
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in weights.items()}
        missing, unexpected = self._model.load_state_dict(tensors, strict=False, assign=True)
        assert (missing, unexpected) == (["lm_head.weight"], [])
        self._model.tie_weights()
        self._known: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def logprobs(self, token_ids: list[int]) -> NDArray[np.float32]:
        """[T, V]: of what follows each token. Computed once; don't change it."""
        if tuple(token_ids) not in self._known:
            with self._torch.inference_mode():
                logits = self._model(self._torch.tensor([token_ids])).logits[0]
                self._known[tuple(token_ids)] = self._torch.log_softmax(logits, dim=-1).numpy()
        return self._known[tuple(token_ids)]

    def likeliest(self, prompt: list[int], drawn: list[int]) -> list[int]:
        """The likeliest token in place of each that was `drawn`, given those before it: the same, exactly if a greedy run draws them."""
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([prompt + drawn[:-1]]), logits_to_keep=len(drawn)).logits[0]
            found: list[int] = logits.argmax(dim=-1).tolist()
        return found


def read_gguf(path: Path) -> GgufModel:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    metadata = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    heads = {"attn_q": metadata["attention.head_count"], "attn_k": metadata["attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:
            # llama.cpp keeps the two halves that a rotation mixes side by side, transformers one after the other.
            array = array.reshape(heads[kind], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{_NAMES[kind]}.weight"] = array
    return metadata, weights


def read_openvino(xml: Path) -> list[NDArray[np.float32]]:
    """Every matrix that the model multiplies with, decompressed."""
    import openvino as ov

    matrices = {}
    for op in ov.Core().read_model(xml).get_ordered_ops():
        if op.get_type_name() != "MatMul" or op.input_value(1).get_partial_shape().is_dynamic:
            continue
        shape = list(op.input_value(1).get_shape())
        scaled = _before(op.input_value(1).get_node())
        if scaled.get_type_name() == "Multiply" and len(shape) == 2:
            shifted, scale = (_before(scaled.input_value(number).get_node()) for number in (0, 1))
            codes, offset = (_before(shifted.input_value(number).get_node()) for number in (0, 1))
            matrix = (_values(codes) - _values(offset)) * _values(scale)
            matrices[op.get_friendly_name()] = matrix.reshape(shape)
    return list(matrices.values())


def _before(node: Any) -> Any:
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node


def _values(constant: Any) -> NDArray[np.float32]:
    shape = list(constant.get_output_shape(0))
    if constant.get_output_element_type(0).get_type_name() == "u4":
        packed = np.asarray(constant.data).view(np.uint8).ravel()
        return np.stack([packed & 15, packed >> 4], axis=1).ravel()[: np.prod(shape)].reshape(shape).astype(np.float32)
    return np.asarray(constant.data).astype(np.float32).reshape(shape)


def matched(weights: Matrices, served: list[NDArray[np.float32]]) -> Matrices:
    """Served matrices by the name of the weight that they render; a few rows are enough to tell."""
    found = {}
    for matrix in served:
        rows = matrix[:4]

        def distance(name: str, matrix: NDArray[np.float32] = matrix, rows: NDArray[np.float32] = rows) -> float:
            other = weights[name]
            return float(np.abs(other[:4] - rows).mean() / np.abs(rows).mean()) if other.shape == matrix.shape else np.inf

        nearest = min(weights, key=distance)
        assert distance(nearest) < 0.3
        assert nearest not in found
        found[nearest] = matrix
    assert set(found) == {name for name, array in weights.items() if array.ndim == 2}
    return found
