"""Plans of quantisation for tests of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from sinkexport.graph.graph_pass import PassContext
from sinkexport.graph.matmuls import Matmul
from sinkexport.graph.quantize.plan import InputScale, Treatment
from sinkexport.quant.weight import WeightScheme
from sinkexport.targets import ONNX, Target


@dataclasses.dataclass(frozen=True)
class SimplePlan:
    """Everything with one scheme, in the given way; modules in `keep` stay."""

    scheme: WeightScheme | None = dataclasses.field(default_factory=lambda: WeightScheme(8))
    dynamic: bool = False
    input_scale: InputScale | None = None
    keep: tuple[str, ...] = ()
    smooth: Callable[[str], np.ndarray | None] = lambda _: None

    def kind(self, module: str) -> object:
        return module in self.keep

    def divisors(self, module: str) -> np.ndarray | None:
        return self.smooth(module)

    def treatment(self, matmul: Matmul) -> Treatment | None:
        if self.scheme is None or matmul.modules[0] in self.keep:
            return None
        return Treatment(self.scheme, dynamic=self.dynamic, input_scale=self.input_scale)

    def is_bfloat16(self, module: str) -> bool:
        return False

    def table(self, module: str) -> WeightScheme | None:
        return None if module in self.keep else self.scheme

    def experts(self, parameter: str) -> WeightScheme | None:
        return None if parameter in self.keep else self.scheme


def context(plan: SimplePlan | None = None, target: Target = ONNX, num_sinks: int = 0) -> PassContext:
    """What a pass is given."""
    return PassContext(target, SimplePlan() if plan is None else plan, num_sinks)
