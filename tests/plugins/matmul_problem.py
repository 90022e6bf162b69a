"""What the tests of matmuls by one matrix and by chosen ones share: random problems, and checks of any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from plugins.capi.header import DTYPES, WEIGHT_TYPES
from tests.plugins import int4_layout
from tests.plugins.gpu_buffers import Buffer, error

FORMS_OF_INT4 = ("int4-32", "int4-64", "int4-128", "int4-32z", "int4-64z", "int4-128z")


class Problem:
    """Fresh random inputs on the GPU: sums of about unit size, integer weights of all values.

    weights: ``int8 | half``, or ``int4-32 | int4-64 | int4-128``, blocks of so many inputs, with zero points if a ``z``
    follows. matrices: [N, K] with what comes before. A subclass sets ``params`` and says what is expected.
    """

    params: Any

    def __init__(
        self,
        library: Any,
        weights: str,
        num_rows: int,
        num_results: int,
        matrices: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.library, self.dtype = library, dtype
        self.kind, _, block = weights.partition("-")
        *_, num_outputs, num_inputs = matrices
        self.x = Buffer(num_rows, num_inputs, dtype=dtype)
        self.y = Buffer(num_results, num_outputs, dtype=dtype)
        self.x.tensor.normal_()
        self.common = {
            "num_rows": num_rows,
            "num_inputs": num_inputs,
            "num_outputs": num_outputs,
            "dtype": DTYPES[str(dtype).removeprefix("torch.")],
            "weight_type": WEIGHT_TYPES[self.kind],
            "x": self.x.address,
            "y": self.y.address,
        }
        if self.kind == "int4":
            self._make_int4(matrices, int(block.removesuffix("z")), has_zeros=block.endswith("z"))
            return
        self.weight = Buffer(*matrices, dtype=torch.int8 if self.kind == "int8" else dtype)
        self.stored = [self.weight]
        self.common["weight"] = self.weight.address
        if self.kind == "int8":
            self.scale = Buffer(*matrices[:-1], dtype=torch.float32)
            self.weight.tensor.random_(-128, 128)
            self.scale.tensor.uniform_(0.5, 1.5).mul_(1 / (74 * num_inputs**0.5))
            self.stored.append(self.scale)
            self.common["scale"] = self.scale.address
        else:
            self.weight.tensor.normal_().mul_(num_inputs**-0.5)

    def _make_int4(self, matrices: tuple[int, ...], block: int, *, has_zeros: bool) -> None:
        *outputs, num_inputs = matrices
        count = -(-num_inputs // block)
        self.block = block
        # Without zero points as many below zero as above, so that chains of matmuls stay of unit size.
        least = 0 if has_zeros else 1
        self.integers = torch.randint(least, 16, matrices, dtype=torch.uint8, device="cuda")
        self.scales = (torch.rand(*outputs, count, device="cuda") + 0.5).mul_(1 / (5 * num_inputs**0.5)).half()
        self.zeros = torch.full((*outputs, count), 8, dtype=torch.uint8, device="cuda")
        if has_zeros:
            self.zeros.random_(0, 16)
        parts = {"weight": int4_layout.tiles(self.integers), "block_scale": int4_layout.groups(self.scales)}
        if has_zeros:
            parts["zero_points"] = int4_layout.groups(self.zeros)
        self.stored = [Buffer(*part.shape, dtype=part.dtype) for part in parts.values()]
        self.common |= {name: buffer.address for name, buffer in zip(parts, self.stored, strict=True)}
        self.common["block_size"] = block
        self._store_int4()

    def _store_int4(self) -> None:
        parts = (int4_layout.tiles(self.integers), int4_layout.groups(self.scales), int4_layout.groups(self.zeros))
        for buffer, part in zip(self.stored, parts, strict=False):
            buffer.tensor.copy_(part)

    def use_small_integers(self, scale: float) -> None:
        """Inputs of -1 .. 1 and weights of -3 .. 3 times `scale`, a power of two: every product is exact."""
        self.x.tensor.random_(-1, 2)
        if self.kind == "int4":
            if len(self.stored) > 2:
                self.zeros.random_(3, 13)
            values = torch.randint(-3, 4, self.integers.shape, device="cuda") + self._by_input(self.zeros)
            self.use_integers(values, scale)
            return
        self.weight.tensor.random_(-3, 4)
        if self.kind == "int8":
            self.scale.tensor.fill_(scale)
        else:
            self.weight.tensor.mul_(scale)

    def use_integers(self, integers: torch.Tensor, scale: float) -> None:
        """INT4 weights of 0 .. 15, all of one scale."""
        self.integers.copy_(integers)
        self.scales.fill_(scale)
        self._store_int4()

    def _by_input(self, values: torch.Tensor) -> torch.Tensor:
        """[.., G] -> [.., K]."""
        return values.repeat_interleave(self.block, -1)[..., : self.integers.shape[-1]]

    def dense(self) -> torch.Tensor:
        """float64 [.., N, K]: what the weights stand for."""
        if self.kind == "int4":
            return (self.integers.double() - self._by_input(self.zeros)) * self._by_input(self.scales.double())
        weight = self.weight.tensor.double()
        return weight * self.scale.tensor.double()[..., None] if self.kind == "int8" else weight

    def buffers(self) -> tuple[Buffer, ...]:
        return self.x, self.y, *self.stored

    def scratch(self) -> tuple[Buffer, ...]:
        """A launch's workspace, where it has one."""
        return ()

    def launch(self) -> None:
        assert self.library.problem(self.params) is None
        addresses = (buffer.address for buffer in self.scratch())
        assert self.library.launch(self.params, *addresses, torch.cuda.current_stream().cuda_stream) == 0

    def poison(self) -> None:
        for buffer in (self.y, *self.scratch()):
            buffer.poison()

    def run(self) -> torch.Tensor:
        self.poison()
        self.launch()
        torch.cuda.synchronize()
        return self.y.tensor.clone()

    def half_weight(self) -> torch.Tensor:
        """Dequantised, as a model in this precision has it."""
        return self.dense().to(self.dtype)

    def float64(self) -> np.ndarray:
        raise NotImplementedError

    def rounded(self) -> torch.Tensor:
        """What is computed exactly but for the roundings that a kernel cannot avoid."""
        return torch.from_numpy(self.float64()).to(self.dtype)

    def torch(self) -> torch.Tensor:
        """What a model in this precision computes with dequantised weights."""
        raise NotImplementedError


def check_error(problem: Problem, record_property: Callable[[str, object], None]) -> None:
    """At most twice PyTorch's, and nothing written outside."""
    expected = problem.float64()
    ours, theirs = error(problem.run(), expected), error(problem.torch(), expected)
    record_property("ours", ours)
    record_property("theirs", theirs)
    # PyTorch's error of one or few outputs may be nearly none by luck: none is asked to be below that of rounding.
    rounding = error(problem.rounded(), expected)
    assert ours <= 2 * max(theirs, rounding)
    assert all(buffer.is_untouched_outside() for buffer in (*problem.buffers(), *problem.scratch()))


def check_repeats(problem: Problem) -> None:
    """To the bit."""
    first = problem.run()
    for _ in range(20):
        assert torch.equal(problem.run(), first)


def check_replays(problem: Problem, renew: Callable[[], object]) -> None:
    """A captured launch computes with new inputs. renew: makes them."""
    problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.launch()
    for _ in range(3):
        renew()
        expected = problem.run()
        problem.poison()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(problem.y.tensor, expected)


def check_chain(
    layers: Sequence[Problem], num_rows: int, width: int, captured: bool, before: Callable[[Problem], object]
) -> None:
    """A chain of launches that read what the last one wrote and write what it read, with and without waiting between.

    Kernels may be placed before the one ahead of them has ended: they must not read or write too early.
    before: done ahead of each launch.
    """
    start, ping, pong = (torch.randn(num_rows, width, dtype=torch.float16, device="cuda") for _ in range(3))
    for i, layer in enumerate(layers):
        layer.params.x, layer.params.y = (t.data_ptr() for t in ((ping, pong) if i % 2 == 0 else (pong, ping)))

    def chain(wait: bool) -> None:
        ping.copy_(start)
        for layer in layers:
            before(layer)
            layer.launch()
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)
    expected = ping.clone()
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            chain(wait=False)
    for _ in range(20):
        ping.fill_(float("nan"))
        if captured:
            graph.replay()
        else:
            chain(wait=False)
        torch.cuda.synchronize()
        assert torch.equal(ping, expected)
