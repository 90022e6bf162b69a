"""Follow what only moves numbers about, by what it does: to which output of a matmul each element belongs.

Families cut queries, keys and values out of one matrix in many ways: in turns by head (GPT-NeoX, Bloom), by groups
(Falcon), one after another. Run on indices in the place of numbers, all of them show where each row comes from.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from sinkexport.graph.edit import is_weight, known_shape, operand, optional

Step = tuple[str, tuple[Any, ...]]
"""An operator and what it needs, hashable: layers of a kind have the same steps."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """A value whose elements are those of `source`, moved about by `nodes`, which are in order."""

    source: ir.Value
    nodes: tuple[ir.Node, ...]
    steps: tuple[Step, ...]


def moved(value: ir.Value) -> Moved:
    """Follow a value back to what computes it. Without steps it is its own source."""
    nodes: list[ir.Node] = []
    steps: list[Step] = []
    while (node := value.producer()) is not None:
        if (whole := _joined_again(node)) is not None:
            nodes[:0] = [operand(node, 0).producer(), node]  # type: ignore[list-item]
            value = whole
            continue
        step = _step(node, value)
        if step is None:
            break
        nodes.insert(0, node)
        steps.insert(0, step)
        value = operand(node, 0)
    return Moved(value, tuple(nodes), tuple(steps))


def _joined_again(node: ir.Node) -> ir.Value | None:
    """What a Concat makes whole again of the parts of a Split."""
    if node.op_type != "Concat" or node.domain or any(value is None for value in node.inputs):
        return None
    parts = [operand(node, i) for i in range(len(node.inputs))]
    split = parts[0].producer()
    if split is None or split.op_type != "Split" or split.domain or list(split.outputs) != parts:
        return None
    whole = operand(split, 0)
    is_same = _axis(split, whole) == node.attributes["axis"].as_int() % len(known_shape(whole))
    return whole if is_same else None


def rows_of_columns(steps: tuple[Step, ...], source_shape: tuple[int, ...]) -> np.ndarray | None:
    """int64 [M]: which column of [P, N] each of [P, M] is. None: rows are not moved as they are."""
    count, width = source_shape
    indices = np.arange(count * width, dtype=np.int64).reshape(source_shape)
    for step in steps:
        indices = _moved(indices, step)
    if indices.ndim != 2 or len(indices) != count:
        return None
    columns: np.ndarray = indices[0]
    of_rows = np.arange(count, dtype=np.int64)[:, None] * width
    return columns if columns.max() < width and np.array_equal(indices, columns + of_rows) else None


def rows_of_heads(steps: tuple[Step, ...], source_shape: tuple[int, ...]) -> np.ndarray | None:
    """int64 [H, D]: which of the N outputs of a token each element of [B, H, T, D] is.

    source_shape: [.., N] of what the steps begin with. None: elements of other tokens take part, or another number of
    tokens.
    """
    *leading, width = source_shape
    tokens = int(np.prod(leading))
    indices = np.arange(tokens * width, dtype=np.int64).reshape(source_shape)
    for step in steps:
        indices = _moved(indices, step)
    if indices.ndim != 4 or indices.shape[0] * indices.shape[2] != tokens:
        return None
    by_token = np.moveaxis(indices, 1, 2).reshape(tokens, indices.shape[1], indices.shape[3])
    rows: np.ndarray = by_token[0]
    of_tokens = np.arange(tokens, dtype=np.int64)[:, None, None] * width
    return rows if rows.max() < width and np.array_equal(by_token, rows + of_tokens) else None


def _step(node: ir.Node, value: ir.Value) -> Step | None:
    """What `node` does to get `value`; None: it is no operator that only moves, or not known now."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    source, given = operand(node, 0), [optional(node, i) for i in range(1, len(node.inputs))]
    if any(each is not None and not is_weight(each) for each in given):
        return None
    numbers = [None if each is None else each.const_value.numpy() for each in given]  # type: ignore[union-attr]
    if node.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
        return "Reshape", known_shape(value)
    if node.op_type == "Transpose":
        return "Transpose", tuple(node.attributes["perm"].as_ints())
    if node.op_type == "Split":
        axis = _axis(node, source)
        sizes = [known_shape(output)[axis] for output in node.outputs]
        place = list(node.outputs).index(value)
        return "Slice", ((axis, sum(sizes[:place]), sum(sizes[: place + 1]), 1),)
    if node.op_type == "Slice":
        return _slice(numbers, len(known_shape(source)))
    if node.op_type == "Gather" and numbers[0] is not None:
        index = numbers[0]
        return "Gather", (_axis(node, source), index.shape, tuple(int(i) for i in index.reshape(-1)))
    return None


def _axis(node: ir.Node, source: ir.Value) -> int:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis % len(known_shape(source))


def _slice(numbers: list[np.ndarray | None], rank: int) -> Step | None:
    starts, ends, axes, steps = (*numbers, None, None, None, None)[:4]
    if starts is None or ends is None:
        return None
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    if any(step < 1 for step in steps):
        return None
    cuts = zip(axes.tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True)
    return "Slice", tuple((axis % rank, start, end, step) for axis, start, end, step in cuts)


def _moved(indices: np.ndarray, step: Step) -> np.ndarray:
    name, given = step
    if name == "Reshape":
        return indices.reshape(given)
    if name == "Transpose":
        return indices.transpose(given)
    if name == "Gather":
        axis, shape, places = given
        return np.take(indices, np.asarray(places).reshape(shape), axis=axis)
    cuts = [slice(None)] * indices.ndim
    for axis, start, end, stride in given:
        cuts[axis] = slice(start, end, stride)
    return indices[tuple(cuts)]
