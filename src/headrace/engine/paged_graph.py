"""Turns an exported OpenVINO model into the graph that a step of the engine runs.

Attention reads and writes paged KV blocks (OpenVINO's own transformation, which lives in a private module;
tests/engine/test_openvino_contract.py guards it), only the asked rows reach the last matrix product, and the likeliest tokens
and the log-sum-exp come out beside the logits where they are wanted: they take up to 6 % of a step. What the export says more
dearly than it need be is said cheaply: products of the same rows (`merged_products.py`), and rotary angles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.engine.merged_products import merge_products
from headrace.errors import ModelError

if TYPE_CHECKING:
    import openvino

STEP_INPUTS = frozenset(
    {"input_ids", "position_ids", "past_lens", "subsequence_begins", "block_indices", "block_indices_begins", "max_context_len"}
)
ROWS_INPUT = "sampled_tokens_indices"
CANDIDATES_INPUT = "candidates_wanted"
CACHES = ("key_cache.", "value_cache.")
TOP = 64
"""Candidates that come out of the graph for each row. 64 hold nearly all of the mass that is ever drawn from."""

_INSTEAD = "Serve a plain decoder (Llama, Qwen, Phi, Mistral, Gemma and the like), or name the URL of a server that runs this one."


def page(model: openvino.Model) -> None:
    """Change `model` in place. Its outputs become `top_logits`, `top_ids` [R, k], `logsumexp` [R] and `logits` [R, vocabulary]. Where the
    scalar `CANDIDATES_INPUT` is false, R is 0 but for the logits.

    Raises `ModelError` for a model whose attention can't be paged, such as one with recurrent state.
    """
    from openvino._offline_transformations import paged_attention_transformation

    inputs = _names(model)
    if "input_ids" not in inputs:
        raise ModelError(f"This model takes {', '.join(sorted(inputs))}, not token ids. {_INSTEAD}")
    merge_products(model)
    _multiply_columns_by_rows(model)
    try:
        paged_attention_transformation(model)
    except RuntimeError as error:
        raise ModelError(f"This model's attention can't be paged ({_first_line(error)}). {_INSTEAD}") from error
    _check(model)
    _head(model)


def _check(model: openvino.Model) -> None:
    inputs = _names(model)
    caches = {name for name in inputs if name.startswith(CACHES)}
    strange = inputs - STEP_INPUTS - caches
    missing = STEP_INPUTS - inputs
    stateful = any(op.get_type_name() in ("ReadValue", "Assign") for op in model.get_ops())
    if not caches or stateful:
        raise ModelError(f"This model keeps a state besides keys and values, which can't be paged. {_INSTEAD}")
    if strange or missing:
        raise ModelError(f"This model's inputs aren't those of a text decoder ({', '.join(sorted(strange | missing))}). {_INSTEAD}")
    for name in ("input_ids", "position_ids"):
        if model.input(name).get_partial_shape().rank.get_length() != 1:
            raise ModelError(f"This model's {name} has several dimensions, as in models that see pictures. {_INSTEAD}")


def _head(model: openvino.Model) -> None:
    """Gather rows in front of the last matrix product; a prompt's other tokens make no logits."""
    import openvino.opset15 as op

    result = model.get_results()[0]
    product = _last_product(result)
    rows = op.parameter([-1], np.int64, name=ROWS_INPUT)
    rows.output(0).set_names({ROWS_INPUT})
    product.input(0).replace_source_output(op.gather(product.input_value(0), rows, op.constant(np.int64(0))).output(0))

    last = np.array([1], np.int64)
    logits = op.squeeze(op.convert(result.input_value(0), "f32"), op.constant(last))
    vocabulary = logits.get_output_partial_shape(0)[1]
    if vocabulary.is_dynamic:
        raise ModelError(f"This model doesn't say how many tokens its vocabulary has. {_INSTEAD}")
    wanted = op.parameter([], np.bool_, name=CANDIDATES_INPUT)
    wanted.output(0).set_names({CANDIDATES_INPUT})
    top_logits, top_ids, mass = _candidates(wanted, logits, min(TOP, vocabulary.get_length()))
    logsumexp = op.squeeze(mass, op.constant(last))

    for other in model.get_results():
        model.remove_result(other)
    model.add_parameters([rows, wanted])
    outputs = (("top_logits", top_logits), ("top_ids", top_ids), ("logsumexp", logsumexp.output(0)), ("logits", logits.output(0)))
    for name, output in outputs:
        output.set_names({name})
    model.add_results([op.result(output) for _, output in outputs])
    model.validate_nodes_and_infer_types()


def _candidates(wanted: Any, logits: Any, k: int) -> list[Any]:
    """Of each row the `k` largest logits [R, k], their tokens, and the log-sum-exp [R, 1]; unless `wanted`, of no row."""
    import openvino as ov
    import openvino.opset15 as op

    rows = op.parameter(logits.get_output_partial_shape(0), np.float32)
    top = op.topk(rows, op.constant(np.int64(k)), axis=1, mode="max", sort="value", index_element_type="i64")
    first, axis = op.constant(np.array([0], np.int64)), op.constant(np.int64(1))
    # From the probability of the likeliest: a softmax goes through a row once, where exp and sum write it out in between.
    best = op.gather_elements(op.softmax(rows, 1), op.gather(top.output(1), first, axis), 1)
    all_of_them = [
        op.result(top.output(0)),
        op.result(top.output(1)),
        op.result(op.subtract(op.gather(top.output(0), first, axis), op.log(best))),
    ]
    none = [op.result(op.constant(np.empty((0, width), kind))) for width, kind in ((k, np.float32), (k, np.int64), (1, np.float32))]

    choice = op.if_op(wanted.output(0))
    choice.set_then_body(ov.Model(all_of_them, [rows]))
    choice.set_else_body(ov.Model(none, []))
    choice.set_input(logits.output(0), rows, None)
    return [choice.set_output(each, other) for each, other in zip(all_of_them, none, strict=True)]


def _multiply_columns_by_rows(model: openvino.Model) -> None:
    """A matrix product of a column and a row is a multiplication. The rotary angles of exported models are one for each token: positions
    by frequencies, 0.2 ms of a step."""
    import openvino.opset15 as op

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or any(node.get_attributes()[side] for side in ("transpose_a", "transpose_b")):
            continue
        column, row = (value.get_partial_shape() for value in node.input_values())
        if column.rank.is_static and column.rank == row.rank and len(column) > 1 and column[-1] == row[-2] == 1:
            product = op.multiply(node.input_value(0), node.input_value(1))
            for target in list(node.output(0).get_target_inputs()):
                target.replace_source_output(product.output(0))


def _last_product(result: Any) -> Any:
    """The vocabulary's matrix product; between it and the result there may be scaling, soft capping or a conversion."""
    node = result
    for _ in range(8):
        for number in range(node.get_input_size()):
            source = node.input_value(number).get_node()
            if source.get_type_name() != "Constant":
                break
        else:
            break
        if source.get_type_name() == "MatMul":
            return source
        node = source
    raise ModelError(f"This model's logits don't come from a product with its vocabulary. {_INSTEAD}")


def _names(model: openvino.Model) -> set[str]:
    return {parameter.get_any_name() for parameter in model.inputs}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
