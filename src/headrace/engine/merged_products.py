"""Queries, keys and values of a layer come from one matrix product instead of three.

Each product has its threads start together and wait for each other, and quantizes its rows again; of models whose heads share keys and
values, the products for these are too narrow to keep several threads busy. The rows of a weight matrix don't mix, so that every number
stays the same to the last bit. OpenVINO does this itself, but only where the processor has AMX.

Products whose outputs go into a function stay apart (gate and up of an MLP): OpenVINO computes it before it rounds the product, and
numbers would change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import openvino

_INNER = frozenset({"Convert", "Multiply", "Subtract", "Reshape"})
"""What turns stored weights into the numbers of a product."""


class _Unlike(Exception):
    """The products can't be one."""


def merge_products(model: openvino.Model) -> int:
    """Change `model` in place, before its attention is paged; returns how many products were left out."""
    import openvino.opset15 as op

    left_out = 0
    for products in _of_the_same_rows(model):
        widths = [_width(product) for product in products]
        try:
            ends = [_end(product) for product in products]
            biased = ends[0].get_name() != products[0].get_name()
            if any((end.get_name() != product.get_name()) != biased for end, product in zip(ends, products, strict=True)):
                raise _Unlike
            plan = _larger([product.input(1) for product in products], widths, 0)
            if biased:
                plan += _larger([end.input(_bias_place(end)) for end in ends], widths, -1)
        except _Unlike:
            continue
        consumers = [list(end.output(0).get_target_inputs()) for end in ends]
        for place, constant in plan:
            place.replace_source_output(constant.output(0))
        _infer(products[0].input_value(1).get_node())
        products[0].validate_and_infer_types()
        if biased:
            _infer(ends[0].input_value(_bias_place(ends[0])).get_node())
            ends[0].validate_and_infer_types()
        last = products[0].get_output_partial_shape(0).rank.get_length() - 1
        parts = op.variadic_split(ends[0], op.constant(np.int64(last)), op.constant(np.array(widths, np.int64)))
        for number, inputs in enumerate(consumers):
            for each in inputs:
                each.replace_source_output(parts.output(number))
        left_out += len(products) - 1
    model.validate_nodes_and_infer_types()
    return left_out


def _of_the_same_rows(model: Any) -> list[list[Any]]:
    """Products with constant weights [N, K], those together that have the same left side."""
    groups: dict[tuple[str, int], list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        said = node.get_attributes()
        weights = node.input_value(1).get_partial_shape()
        if said["transpose_b"] and not said["transpose_a"] and weights.is_static and len(weights) == 2:
            source = node.input_value(0)
            groups.setdefault((source.get_node().get_name(), source.get_index()), []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _width(product: Any) -> int:
    return int(product.input_value(1).get_partial_shape()[0].get_length())


def _end(product: Any) -> Any:
    """The product, or the sum with its bias, if nothing but a new shape comes of it. Raises `_Unlike`."""
    end = product
    consumers = list(end.output(0).get_target_inputs())
    if len(consumers) == 1 and consumers[0].get_node().get_type_name() == "Add":
        end = consumers[0].get_node()
        consumers = list(end.output(0).get_target_inputs())
        _bias_place(end)
    if not consumers or any(each.get_node().get_type_name() != "Reshape" for each in consumers):
        raise _Unlike
    return end


def _bias_place(end: Any) -> int:
    """The input of a sum that is constant. Raises `_Unlike` where none is: two activations are added."""
    for place in range(2):
        node = end.input_value(place).get_node()
        while node.get_type_name() == "Convert":
            node = node.input_value(0).get_node()
        if node.get_type_name() == "Constant":
            return place
    raise _Unlike


def _larger(places: Sequence[Any], widths: Sequence[int], axis: int) -> list[tuple[Any, Any]]:
    """The constants that make the first of these inputs as wide as all, and where they belong. Raises `_Unlike`."""
    nodes = [place.get_source_output().get_node() for place in places]
    kind = nodes[0].get_type_name()
    if any(node.get_type_name() != kind for node in nodes):
        raise _Unlike
    if kind == "Constant":
        constant = _constant(places[0].get_node().get_type_name(), nodes, widths, axis)
        return [] if constant is None else [(places[0], constant)]
    # A node that others read, too, can't change for them.
    if kind not in _INNER or len(nodes[0].output(0).get_target_inputs()) != 1:
        raise _Unlike
    return [
        change for number in range(nodes[0].get_input_size()) for change in _larger([node.input(number) for node in nodes], widths, axis)
    ]


def _infer(node: Any) -> None:
    """Have the shapes follow, from the constants on."""
    for value in node.input_values():
        _infer(value.get_node())
    node.validate_and_infer_types()


def _constant(reader: str, nodes: Sequence[Any], widths: Sequence[int], axis: int) -> Any:
    """The nodes' values in one, along `axis`; None where it is the same for all. Raises `_Unlike`."""
    import openvino as ov
    import openvino.opset15 as op

    first = nodes[0]
    element = first.get_element_type()
    shapes = [list(node.get_output_shape(0)) for node in nodes]
    if any(node.get_element_type() != element for node in nodes):
        raise _Unlike
    values = [node.data.reshape(-1) for node in nodes]
    if reader == "Reshape":
        # It says the shape, whose first number is the width.
        if any(value[0] != width or not np.array_equal(value[1:], values[0][1:]) for value, width in zip(values, widths, strict=True)):
            raise _Unlike
        return op.constant(np.array([sum(widths), *values[0][1:]], values[0].dtype))
    if all(shape and shape[axis] == width for shape, width in zip(shapes, widths, strict=True)):
        others = [shape[1:] if axis == 0 else shape[:-1] for shape in shapes]
        whole_bytes = all(
            8 * node.get_byte_size() == element.bitwidth * int(np.prod(shape)) for node, shape in zip(nodes, shapes, strict=True)
        )
        if any(other != others[0] for other in others) or not whole_bytes or (axis and set(others[0]) - {1}):
            raise _Unlike
        shape = [sum(widths), *others[0]] if axis == 0 else [*others[0], sum(widths)]
        joined = ov.Tensor(element, ov.Shape(shape))
        joined.data.reshape(-1)[:] = np.concatenate(values)
        return op.constant(joined)
    if all(shape == shapes[0] and np.array_equal(value, values[0]) for shape, value in zip(shapes, values, strict=True)):
        return None
    raise _Unlike
