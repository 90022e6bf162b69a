"""Quantised matmuls in the operators that ONNX Runtime's CPU provider runs fast.

Weights only: MatMulNBits, whose kernels read each weight once, packed. Its INT8 arithmetic (accuracy_level 4) rounds
the input to 8 bits for each token and block of 16 to 256 channels inside the matmul; that costs far less accuracy than
the weights' own rounding and is what makes it fast. onnxruntime's quantiser for it works on finished files and knows no
choice of scales, so weights come from `quantized_weight` instead, with the same packing (the tests compare the two).

Dynamic: DynamicQuantizeMatMul has one scale for all tokens of its input, so it serves single tokens; several are
quantised one by one, by the same formula, and multiplied by MatMulInteger. Static: MatMulIntegerToFloat. These kernels
take float32 only.

INT8 inputs are unsigned with zero point 128 where they are static: on x86 the kernels for signed ones are slow. The
weights of those matmuls are unsigned with zero point 128 too. Without VNNI, ONNX Runtime multiplies unsigned inputs by
signed weights with an instruction that saturates sums of two numbers at 16 bits. That is wrong by up to a sixth of
the result. With unsigned weights every processor's sums are exact, and VNNI's and Arm's kernels lose nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import constant, known_shape, replace_node
from sinkexport.graph.matmuls import Matmul
from sinkexport.graph.quantize.form import FormParts
from sinkexport.graph.quantize.plan import InputScale
from sinkexport.quant.weight import QuantizedWeight

DOMAIN = "com.microsoft"
BLOCK_SIZES = (256, 128, 64, 32, 16)
"""What MatMulNBits takes."""

INT8_ARITHMETIC = 4
"""MatMulNBits' accuracy_level."""

ZERO_POINT = 128


class OrtForm(FormParts):
    """Writes one graph."""

    def weight_only(self, matmul: Matmul, weight: QuantizedWeight) -> None:
        """x @ W, x in floating point."""
        b, block = self._builder(), block_size(weight)
        inputs = [matmul.x, *self._blocks(weight, matmul.dtype)]
        result = b.op(
            "MatMulNBits",
            inputs,
            known_shape(matmul.node.outputs[0]),
            matmul.dtype,
            domain=DOMAIN,
            K=weight.num_inputs,
            N=weight.num_outputs,
            bits=weight.scheme.bits,
            block_size=block,
            accuracy_level=INT8_ARITHMETIC,
        )
        replace_node(matmul.node, b.nodes, [result])

    def gather(self, node: ir.Node, weight: QuantizedWeight) -> None:
        """Rows of a table: taken as they are stored, then turned to floating point. They may be a matmul's weights."""
        b, bits = self._builder(), weight.scheme.bits
        ids, result = node.inputs[1], node.outputs[0]
        if ids is None or result.dtype is None:
            raise ValueError(f"Gather '{node.name}' without indices or type")
        parts = self._blocks(weight, result.dtype)
        count, depth = int(np.prod(known_shape(ids))), weight.num_inputs
        flat = b.reshape(ids, (count,))
        rows = [b.op("Gather", [part, flat], (count, *known_shape(part)[1:]), part.dtype, axis=0) for part in parts]
        width = int(np.prod(known_shape(rows[0])[1:]))
        rows[0] = b.reshape(rows[0], (count, width))
        all_rows = b.ints(np.arange(count), "rows")
        padded = width * 8 // bits
        values = b.op(
            "GatherBlockQuantized",
            [rows[0], all_rows, *rows[1:]],
            (count, padded),
            result.dtype,
            domain=DOMAIN,
            bits=bits,
            block_size=block_size(weight),
            gather_axis=0,
            quantize_axis=1,
        )
        if padded != depth:
            values = b.split(values, [depth, padded - depth], 1)[0]
        replace_node(node, b.nodes, [b.reshape(values, known_shape(result))])

    def dynamic(self, matmul: Matmul, weight: QuantizedWeight) -> None:
        """x @ W, each token of x rounded to 0 .. 255 with a scale and a zero point of its own."""
        b = self._builder()
        x, rows, shape = b.cast(matmul.x, ir.DataType.FLOAT), matmul.num_rows, known_shape(matmul.node.outputs[0])
        matrix, zeros, scales = self._unsigned(weight), self._zero_point(), self._scales(weight)
        if rows == 1:
            out = b.op("DynamicQuantizeMatMul", [x, matrix, scales, zeros], shape, x.dtype, domain=DOMAIN)
        else:
            quantized, scale, zero = _quantized_rows(b, x)
            # MatMulInteger takes one zero point for all rows only: zero here; each row's share is subtracted below.
            nothing = constant(self.graph, np.asarray(0, np.uint8), "no_zero_point")
            sums = b.op("MatMulInteger", [quantized, matrix, nothing, zeros], shape, ir.DataType.INT32)
            offset = b.op("Mul", [zero, self._column_sums(weight)])
            exact = b.op("Sub", [b.cast(sums, ir.DataType.FLOAT), offset])
            out = b.op("Mul", [b.op("Mul", [exact, scale]), scales])
        replace_node(matmul.node, b.nodes, [b.cast(out, matmul.dtype)])

    def static(self, matmul: Matmul, weight: QuantizedWeight, scale: InputScale) -> None:
        """x @ W, x rounded with scales that calibration found."""
        b = self._builder()
        x, shape = b.cast(matmul.x, ir.DataType.FLOAT), known_shape(matmul.node.outputs[0])
        step, before, after = self._static_scale(b, matmul, scale)
        if before is not None:
            x = b.op("Mul", [x, before])
        zero = self._zero_point()
        quantized = b.op("QuantizeLinear", [x, step, zero], known_shape(x), ir.DataType.UINT8)
        out = b.op(
            "MatMulIntegerToFloat",
            [quantized, self._unsigned(weight), step, self._scales(weight), zero, zero],
            shape,
            ir.DataType.FLOAT,
            domain=DOMAIN,
        )
        if after is not None:
            out = b.op("Mul", [out, after])
        replace_node(matmul.node, b.nodes, [b.cast(out, matmul.dtype)])

    def _static_scale(
        self, b: Builder, matmul: Matmul, scale: InputScale
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """The scale, and what the tokens are to be multiplied by before and after the matmul, if they differ.

        A single token takes the sinks' scale or the others', which costs one small node.
        """
        rest = b.scalar(scale.rest, ir.DataType.FLOAT)
        if scale.sinks is None or not self.num_sinks:
            return rest, None, None
        if matmul.num_rows > 1:
            return rest, *self.sink_factors(b, matmul, scale)
        is_sink = self.is_sink(matmul.node, known_shape(matmul.x)[:-1])
        only = self.per_run.once("one token", matmul.node, lambda b: b.reshape(is_sink, ()))
        sinks = b.scalar(scale.sinks, ir.DataType.FLOAT)
        return b.op("Where", [only, sinks, rest], (), ir.DataType.FLOAT), None, None

    def _builder(self) -> Builder:
        """For nodes of ONNX Runtime's own domain, which the graph then has to import."""
        self.graph.opset_imports[DOMAIN] = 1
        return Builder(self.graph)

    # --- weights ---

    def _blocks(self, weight: QuantizedWeight, dtype: ir.DataType) -> list[ir.Value]:
        """Integers uint8 [N, G, block * bits / 8], scales [N, G] and, if there are any, zero points of MatMulNBits."""
        bits, block = weight.scheme.bits, block_size(weight)
        groups = -(-weight.num_inputs // block)
        shape = (weight.num_outputs, groups)
        parts = [
            self.lazy(weight, "packed", ir.DataType.UINT8, (*shape, block * bits // 8), lambda: packed(weight)),
            self.lazy(weight, "scales", dtype, shape, lambda: _repeated(weight.scales(), groups)),
        ]
        if not weight.scheme.symmetric:
            zeros = (weight.num_outputs, -(-groups * bits // 8))
            parts.append(self.lazy(weight, "zero_points", ir.DataType.UINT8, zeros, lambda: packed_zeros(weight)))
        return parts

    def _unsigned(self, weight: QuantizedWeight) -> ir.Value:
        """uint8 [K, N]: integers from 0, zero point `ZERO_POINT`."""
        shape = (weight.num_inputs, weight.num_outputs)
        return self.lazy(weight, "uint8", ir.DataType.UINT8, shape, lambda: np.ascontiguousarray(weight.unsigned().T))

    def _zero_point(self) -> ir.Value:
        return constant(self.graph, np.asarray(ZERO_POINT, np.uint8), "zero_point")

    def _scales(self, weight: QuantizedWeight) -> ir.Value:
        """float32 [N]."""
        return self.lazy(
            weight, "scales", ir.DataType.FLOAT, (weight.num_outputs,), lambda: weight.scales()[:, 0].astype(np.float32)
        )

    def _column_sums(self, weight: QuantizedWeight) -> ir.Value:
        """float32 [N]: sums of the integers over K."""
        return self.lazy(
            weight,
            "sums",
            ir.DataType.FLOAT,
            (weight.num_outputs,),
            lambda: weight.integers().sum(axis=1, dtype=np.int32).astype(np.float32),
        )


def block_size(weight: QuantizedWeight) -> int:
    """The block of MatMulNBits: the scheme's; without one, the largest that divides K (32 if none does)."""
    if weight.scheme.block_size is not None:
        return weight.scheme.block_size
    return next((size for size in BLOCK_SIZES if weight.num_inputs % size == 0), 32)


def packed(weight: QuantizedWeight) -> np.ndarray:
    """uint8 [N, G, block * bits / 8]: integers from 0, two to a byte if they have 4 bits, the first one low.

    A last block that K does not fill ends in zero points.
    """
    bits, block = weight.scheme.bits, block_size(weight)
    integers = weight.unsigned()  # [N, K]
    groups = -(-weight.num_inputs // block)
    if missing := groups * block - weight.num_inputs:
        zeros = weight.zero_points()
        fill = np.full((len(integers), 1), 2 ** (bits - 1), np.uint8) if zeros is None else zeros[:, -1:]
        integers = np.concatenate([integers, np.repeat(fill, missing, axis=1)], axis=1)
    blocks = integers.reshape(len(integers), groups, block)
    return blocks if bits == 8 else _nibbles(blocks)


def packed_zeros(weight: QuantizedWeight) -> np.ndarray:
    """uint8 [N, ceil(G * bits / 8)]."""
    zeros = weight.zero_points()
    if zeros is None:
        raise ValueError(f"'{weight.name}' is symmetric")
    if weight.scheme.bits == 8:
        return zeros
    return _nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)), constant_values=8))


def _nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [.., 2n] below 16 -> uint8 [.., n]."""
    joined: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
    return joined


def _repeated(scales: np.ndarray, groups: int) -> np.ndarray:
    """One scale for each output becomes one for each of its blocks."""
    return scales if scales.shape[1] == groups else np.repeat(scales, groups, axis=1)


def _quantized_rows(b: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """DynamicQuantizeLinear (ONNX) of each row of x [.., K]: uint8 [.., K], scale and zero point float32 [.., 1]."""
    rows, as_float = (*known_shape(x)[:-1], 1), ir.DataType.FLOAT
    axis, zero = b.ints([-1], "last_axis"), b.scalar(0.0, as_float)
    low = b.op("Min", [b.op("ReduceMin", [x, axis], rows, as_float, keepdims=1), zero])
    high = b.op("Max", [b.op("ReduceMax", [x, axis], rows, as_float, keepdims=1), zero])
    highest = b.scalar(255.0, as_float)
    scale = b.op("Div", [b.op("Sub", [high, low]), highest])
    scale = b.op("Where", [b.op("Equal", [scale, zero]), b.scalar(1.0, as_float), scale], rows, as_float)
    zero_point = b.op("Div", [b.op("Neg", [low]), scale])
    zero_point = b.op("Clip", [b.op("Round", [zero_point]), zero, highest], rows)
    shifted = b.op("Add", [b.op("Round", [b.op("Div", [x, scale])]), zero_point])
    clipped = b.op("Clip", [shifted, zero, highest], known_shape(x))
    return b.cast(clipped, ir.DataType.UINT8), scale, zero_point
