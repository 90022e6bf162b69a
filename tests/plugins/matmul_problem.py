"""What the tests of matmuls by one matrix and by chosen ones share: random problems, and checks of any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from plugins.capi.header import DTYPES, WEIGHT_TYPES
from tests.plugins.gpu_buffers import Buffer, error


class Problem:
    """Fresh random inputs on the GPU: sums of about unit size, INT8 weights of all 256 values.

    weights: ``int8 | half``. matrices: [N, K] with what comes before. A scale is there in both cases, all ones with
    half weights, which it is not given to. A subclass sets ``params`` and says what is expected.
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
        self.library, self.dtype, self.is_int8 = library, dtype, weights == "int8"
        *_, num_outputs, num_inputs = matrices
        self.x = Buffer(num_rows, num_inputs, dtype=dtype)
        self.weight = Buffer(*matrices, dtype=torch.int8 if self.is_int8 else dtype)
        self.scale = Buffer(*matrices[:-1], dtype=torch.float32)
        self.y = Buffer(num_results, num_outputs, dtype=dtype)
        self.x.tensor.normal_()
        if self.is_int8:
            self.weight.tensor.random_(-128, 128)
            self.scale.tensor.uniform_(0.5, 1.5).mul_(1 / (74 * num_inputs**0.5))
        else:
            self.weight.tensor.normal_().mul_(num_inputs**-0.5)
            self.scale.tensor.fill_(1.0)
        self.common = {
            "num_rows": num_rows,
            "num_inputs": num_inputs,
            "num_outputs": num_outputs,
            "dtype": DTYPES[str(dtype).removeprefix("torch.")],
            "weight_type": WEIGHT_TYPES[weights],
            "x": self.x.address,
            "weight": self.weight.address,
            "scale": self.scale.address if self.is_int8 else 0,
            "y": self.y.address,
        }

    def buffers(self) -> tuple[Buffer, ...]:
        return self.x, self.weight, self.scale, self.y

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
        return (self.weight.tensor.float() * self.scale.tensor[..., None]).to(self.dtype)

    def float64(self) -> np.ndarray:
        raise NotImplementedError

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
    rounding = error(torch.from_numpy(expected).to(problem.dtype), expected)
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
