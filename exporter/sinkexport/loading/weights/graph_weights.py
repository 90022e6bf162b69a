"""The weights of a written graph, as the matrices that they stand for, whatever the layout and the rounding.

Read back from the files of the bundle, so that what is compared is what a runtime will read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sinkexport.loading.checkpoints.file_tensor import Floats, Indices
from sinkexport.loading.weights.packed_matrices import PACKED, TILED, packed_rows, row_places, tiled_rows
from sinkexport.util.process_memory import release_pages
from sinkexport.util.traced_names import MODEL

REORDERED = ".by_head"
"""Suffix of matrices and biases of the CPU library whose rows are in another order."""

BY_HEAD = "const.by_head"
"""The plugin's copies of the model's numbers of heads, in float32."""

QUANTIZED = (".packed", ".uint8", ".int8x4", ".int8")
PACKED_OR_QUANTIZED = (*QUANTIZED, PACKED, TILED)
COMPANIONS = (".scales", ".zero_points", ".sums")

HALF_RANGE = 128
SMALL_BYTES = 2**20
"""Largest constant that two graphs may hold twice."""

LAYER = re.compile(r"(?:^|\.)(\d+)\.")

Read = Callable[[Indices, Indices], tuple[Floats, Floats]]
"""Rows and columns -> numbers float32 [rows, columns] and their steps, 0 where nothing was rounded to integers."""


@dataclasses.dataclass(frozen=True, eq=False)
class GraphMatrix:
    """A constant of the graph, with the constants that belong to it.

    parts: parameters of the model that it is made of, row after row; none: it has no parameter's name. layers: the
    first and the last layer that it may belong to by where it is used. raw: its numbers where nothing was rounded to
    integers. swapped: the same with the last two of three axes exchanged; flat: each number as a row. slack: how many
    columns at the end may be padding.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, int]
    read: Read
    layers: tuple[float, float]
    raw: Callable[[], npt.NDArray[Any]] | None = None
    swapped: GraphMatrix | None = None
    flat: GraphMatrix | None = None
    slack: int = 0
    sources: tuple[ir.TensorProtocol, ...] = ()
    """The constants themselves."""

    claimed: npt.NDArray[np.bool_] = dataclasses.field(init=False)
    """Rows that are known to be the file's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "claimed", np.zeros(self.shape[0], bool))

    @property
    def is_claimed(self) -> bool:
        """Whether all of it is known to be the file's, in one of its forms."""
        return any(one is not None and bool(one.claimed.all()) for one in (self, self.swapped, self.flat))

    def may_be_of(self, layer: int | None) -> bool:
        """Whether it is read where the constants of a layer are, or that cannot be known."""
        return layer is None or self.layers[0] <= layer <= self.layers[1]

    @property
    def is_small(self) -> bool:
        """Whether its content can be compared as a whole."""
        return sum(tensor.nbytes for tensor in self.sources) <= SMALL_BYTES

    @property
    def content(self) -> bytes:
        """Its numbers, whatever their shape."""
        return b"".join(tensor.tobytes() for tensor in self.sources)

    def release(self) -> None:
        """Let go of the pages of the bundle's file that were read."""
        for tensor in self.sources:
            if isinstance(tensor, ir.ExternalTensor):
                release_pages(tensor.raw)

    def is_same(self, other: GraphMatrix) -> bool:
        """Whether the two are one place of a file, or have the same content."""
        if len(self.sources) != len(other.sources):
            return False
        pairs = list(zip(self.sources, other.sources, strict=True))
        if all(_place(one) is not None and _place(one) == _place(two) for one, two in pairs):
            return True
        return self.is_small and self.content == other.content


def _place(tensor: ir.TensorProtocol) -> object:
    """Place of a constant that is not in the ONNX file itself; None: it is there."""
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return tensor.path, tensor.offset, tensor.length, tensor.dtype, tensor.shape


def layer_of(name: str) -> int | None:
    """The first number in a name: that of the layer, in every family."""
    match = LAYER.search(name)
    return None if match is None else int(match[1])


def read_graph(path: Path) -> list[GraphMatrix]:
    """The constants of an ONNX file, but for those that this package's passes made themselves."""
    graph = ir.load(path).graph
    values = {str(name): value for name, value in graph.initializers.items()}
    positions = _layer_ranges(graph)
    found = []
    for name, value in values.items():
        tensor = value.const_value
        is_ours = name.startswith("const.") and not name.startswith(BY_HEAD)
        if tensor is None or not tensor.size or is_ours or not list(value.uses()):
            continue
        layers = positions.get(name, (-np.inf, np.inf))
        suffix = next((s for s in QUANTIZED if name.endswith(s)), None)
        layout = next((s for s in (PACKED, TILED) if name.endswith(s)), None)
        if layout is not None:
            found.append(_in_tiles(name.removesuffix(layout), layout, value, values, layers))
        elif suffix is not None and f"{name.removesuffix(suffix)}.scales" in values:
            found.append(_quantized(name.removesuffix(suffix), suffix, value, values, layers))
        elif tensor.dtype.is_floating_point() and not (name.endswith(COMPANIONS) and _has_base(name, values)):
            found.append(_floating(name, _in_order(name, value, tensor), layers))
    return found


def _in_order(name: str, value: ir.Value, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A bias [N], or those of experts [E, N], in the model's order."""
    places = row_places(value) if name.endswith(REORDERED) else None
    return tensor if places is None else ir.Tensor(tensor.numpy()[..., places], name=name)


def _has_base(name: str, values: dict[str, ir.Value]) -> bool:
    base = name.rpartition(".")[0]
    return any(f"{base}{suffix}" in values for suffix in PACKED_OR_QUANTIZED)


def parameters_of(name: str) -> tuple[str, ...]:
    """Names of the model's parameters in a constant's name, such as ``model.a.weight.T+model.b.weight.T``."""
    names = [part.removesuffix(".smoothed").removesuffix(".T") for part in name.removesuffix(REORDERED).split("+")]
    if not all(part.startswith(MODEL) for part in names):
        return ()
    return tuple(part.removeprefix(MODEL) for part in names)


def _layer_ranges(graph: ir.Graph) -> dict[str, tuple[float, float]]:
    """Layers between which each constant is read first, by the named ones before and after: nodes are in order."""
    first: dict[str, int] = {}
    marks: list[tuple[int, int]] = []
    for place, node in enumerate(graph):
        for value in node.inputs:
            if value is None or not value.is_initializer() or str(value.name) in first:
                continue
            name = str(value.name)
            first[name] = place
            layer = layer_of(name) if parameters_of(name) else None
            if layer is not None:
                marks.append((place, layer))
    places, layers = np.array([p for p, _ in marks]), np.array([n for _, n in marks], float)
    ranges = {}
    for name, place in first.items():
        before, after = layers[places <= place], layers[places >= place]
        ranges[name] = (float(before.max()) if len(before) else -np.inf, float(after.min()) if len(after) else np.inf)
    return ranges


def _floating(name: str, tensor: ir.TensorProtocol, layers: tuple[float, float]) -> GraphMatrix:
    parts, dims = parameters_of(name), tuple(int(n) for n in tensor.shape.numpy())

    def view(array: npt.NDArray[Any]) -> Read:
        def read(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
            taken = array[rows][:, columns] if len(rows) <= len(columns) else array[:, columns][rows]
            values = np.asarray(taken, np.float32)
            return values, np.zeros_like(values)

        return read

    def lazily(shape: tuple[int, int], lay: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Read:
        return lambda rows, columns: view(lay(tensor.numpy()).reshape(shape))(rows, columns)

    if len(dims) == 2 and parts and name.split("+")[0].removesuffix(".smoothed").endswith(".T"):
        return GraphMatrix(
            name=name,
            parts=parts,
            shape=(dims[1], dims[0]),
            read=lazily((dims[1], dims[0]), lambda a: a.T),
            layers=layers,
            raw=tensor.numpy,
            sources=(tensor,),
        )
    shape = (int(np.prod(dims[:-1])), dims[-1]) if len(dims) > 1 else (dims[0] if dims else 1, 1)
    swapped = None
    if len(dims) == 3:
        count, first, last = dims

        def read_swapped(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
            values = np.asarray(tensor.numpy()[rows[:, None] // last, columns[None], rows[:, None] % last], np.float32)
            return values, np.zeros_like(values)

        swapped = GraphMatrix(
            name=name, parts=parts, shape=(count * last, first), read=read_swapped, layers=layers, raw=tensor.numpy
        )
    flat = None
    if len(dims) > 1 and tensor.nbytes <= SMALL_BYTES:
        flat = GraphMatrix(
            name=name,
            parts=parts,
            shape=(tensor.size, 1),
            read=lazily((tensor.size, 1), lambda a: a),
            layers=layers,
            raw=tensor.numpy,
        )
    return GraphMatrix(
        name=name,
        parts=parts,
        shape=shape,
        read=lazily(shape, lambda a: a),
        layers=layers,
        raw=tensor.numpy,
        swapped=swapped,
        flat=flat,
        sources=(tensor,),
    )


def _quantized(
    base: str, suffix: str, value: ir.Value, values: dict[str, ir.Value], layers: tuple[float, float]
) -> GraphMatrix:
    """Integers times scales; see graph/quantize/ for the layouts."""
    integers, scales = _numbers(value), np.asarray(_numbers(values[f"{base}.scales"]), np.float32)
    zeros = values.get(f"{base}.zero_points")
    read: Read
    swapped = None
    if suffix == ".packed":
        shape, read = _packed(value, integers, scales, None if zeros is None else _numbers(zeros))
    elif suffix == ".int8x4":
        matrices = np.ascontiguousarray(integers).view(np.int8)
        rows = matrices.reshape(-1, matrices.shape[-1])
        shape, read = rows.shape, _scaled(lambda r, c: rows[r[:, None], c[None]], scales.reshape(-1))
        if matrices.ndim == 3:  # experts, [E, M, K]
            swapped = _by_input(base, matrices.transpose(0, 2, 1), scales, layers)
    elif integers.ndim == 3:  # experts, uint8 [E, K, M]
        count, depth, width = integers.shape
        shape = (count * width, depth)
        read = _scaled(
            lambda r, c: integers[r[:, None] // width, c[None], r[:, None] % width].astype(np.int16) - HALF_RANGE,
            scales.reshape(-1),
        )
        swapped = _by_input(base, integers, scales, layers, HALF_RANGE)
    elif suffix == ".uint8" or _axis(value) == 1:  # [K, N]
        offset = HALF_RANGE if suffix == ".uint8" else 0
        shape = (integers.shape[1], integers.shape[0])
        read = _scaled(lambda r, c: integers[c[None], r[:, None]].astype(np.int16) - offset, scales.reshape(-1))
    else:
        shape, read = integers.shape, _scaled(lambda r, c: integers[r[:, None], c[None]], scales.reshape(-1))
    slack = _bits(value, integers)[2] - 1 if suffix == ".packed" else 0
    read = _in_model_order(value, read)
    sources = tuple(
        one.const_value
        for one in (value, values[f"{base}.scales"], zeros)
        if one is not None and one.const_value is not None
    )
    return GraphMatrix(
        name=base,
        parts=parameters_of(base),
        shape=(int(shape[0]), int(shape[1])),
        read=read,
        layers=layers,
        swapped=swapped,
        slack=slack,
        sources=sources,
    )


def _in_tiles(
    base: str, layout: str, value: ir.Value, values: dict[str, ir.Value], layers: tuple[float, float]
) -> GraphMatrix:
    """A weight in the layout of the CPU library, or INT4 in that of the TensorRT plugin."""
    companions = [values.get(f"{base}{suffix}") for suffix in (".scales", ".zero_points")]
    scales, zeros = (None if one is None else _numbers(one) for one in companions)
    if layout == PACKED:
        packed = packed_rows(value, _numbers(value), scales, zeros)
    elif scales is None:
        raise ValueError(f"'{base}' has no scales")
    else:
        packed = tiled_rows(value, _numbers(value), scales, zeros)
    parts, swapped = parameters_of(base), None
    if packed.num_experts:
        swapped = GraphMatrix(
            name=base, parts=parts, shape=packed.swapped_shape, read=packed.read_swapped, layers=layers
        )
    sources = tuple(one.const_value for one in (value, *companions) if one is not None and one.const_value is not None)
    return GraphMatrix(
        name=base,
        parts=parts,
        shape=packed.shape,
        read=_in_model_order(value, packed.read),
        layers=layers,
        swapped=swapped,
        sources=sources,
    )


def _in_model_order(value: ir.Value, read: Read) -> Read:
    """Read columns as the model has them, where the matmul's input is reordered by a Gather (activation order)."""
    for use in value.uses():
        x = use.node.inputs[0]
        gather = None if x is None else x.producer()
        order = None if gather is None or gather.op_type != "Gather" else gather.inputs[1]
        if order is not None and order.const_value is not None and order.const_value.shape.rank() == 1:
            place = np.argsort(order.const_value.numpy())
            return lambda rows, columns: read(rows, place[columns])
    return read


def _by_input(
    base: str, integers: npt.NDArray[Any], scales: Floats, layers: tuple[float, float], offset: int = 0
) -> GraphMatrix:
    """Experts' integers [E, K, M], with a scale for each expert and output, as rows [E * K, M]: some families keep
    their experts so.
    """
    count, depth, width = integers.shape
    by_output = scales.reshape(count, width)

    def read(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
        step = by_output[rows[:, None] // depth, columns[None]]
        units = integers[rows[:, None] // depth, rows[:, None] % depth, columns[None]].astype(np.int16) - offset
        return units.astype(np.float32) * step, step

    return GraphMatrix(name=base, parts=parameters_of(base), shape=(count * depth, width), read=read, layers=layers)


def _scaled(take: Callable[[Indices, Indices], npt.NDArray[Any]], scales: Floats) -> Read:
    """One scale for each row."""

    def read(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
        step = np.broadcast_to(scales[rows][:, None], (len(rows), len(columns)))
        return take(rows, columns).astype(np.float32) * step, step

    return read


def _packed(
    value: ir.Value, integers: npt.NDArray[Any], scales: Floats, zeros: npt.NDArray[Any] | None
) -> tuple[tuple[int, int], Read]:
    """MatMulNBits' weights: uint8 [N, G, block * bits / 8], scales [N, G], zero points [N, ceil(G * bits / 8)]."""
    bits, depth, block = _bits(value, integers)

    def read(rows: Indices, columns: Indices) -> tuple[Floats, Floats]:
        row, group, inner = rows[:, None], columns[None] // block, columns[None] % block
        codes = _codes(integers[row, group, inner * bits // 8], inner, bits)
        if zeros is None:
            zero: Any = 2 ** (bits - 1)
        else:
            zero = _codes(zeros[row, group * bits // 8], group, bits)
        step = scales[row, group]
        return (codes.astype(np.int16) - zero).astype(np.float32) * step, step

    return (integers.shape[0], depth), read


def _codes(values: npt.NDArray[Any], places: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    return values if bits == 8 else (values >> (4 * (places % 2)).astype(np.uint8)) & 15


def _bits(value: ir.Value, integers: npt.NDArray[Any]) -> tuple[int, int, int]:
    """Bits of a weight, weights of a row and of a block, as the operator that reads them has it."""
    for node in _readers(value):
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
            depth = node.attributes["K"].as_int() if "K" in node.attributes else integers.shape[1] * block
            return bits, depth, block
    raise ValueError(f"'{value.name}' is read by no operator that has its bits")


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read a constant, matmuls first, through those that only take rows of it."""
    nodes = [use.node for use in value.uses()]
    yield from nodes
    for node in nodes:
        if node.op_type in ("Gather", "Reshape"):
            yield from _readers(node.outputs[0])


def _axis(value: ir.Value) -> int | None:
    """The axis of DequantizeLinear's scales."""
    for use in value.uses():
        if use.node.op_type == "DequantizeLinear":
            return use.node.attributes["axis"].as_int()
    return None


def _numbers(value: ir.Value) -> npt.NDArray[Any]:
    if value.const_value is None:
        raise ValueError(f"'{value.name}' has no content")
    return np.asarray(value.const_value.numpy())
