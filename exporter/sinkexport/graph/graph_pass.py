"""Graph passes: their base class, how targets name them, and how they are run. README.md says how to add one."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from sinkexport.targets import ONNX, Target

if TYPE_CHECKING:
    from sinkexport.graph.quantize.plan import Plan


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What one export asks of its passes.

    target: whose operators the graph is for. plan: what to quantise; None: nothing.
    num_sinks: first tokens of a stream whose inputs quantisation may treat apart.
    verifies: whether the graph verifies drafts: its attention writes no state and hands out the new rows.
    """

    target: Target = ONNX
    plan: Plan | None = None
    num_sinks: int = 0
    verifies: bool = False


class GraphPass(ir.passes.InPlacePass):
    """One rewrite of a graph with static shapes.

    A subclass overrides `call`, which says in its result whether the model changed. A graph that does not fit is left
    as it is; one that must not be left so is refused (ValueError, or UsageError where a user can do something about
    it). Run once more, a pass changes nothing.
    """

    def __init__(self, context: PassContext | None = None) -> None:
        self.context = context or PassContext()


def pass_class(name: str) -> type[GraphPass]:
    """The pass of the file ``graph/passes/<name>.py``: the class of that name in capitals, ``FoldConstants``."""
    module = importlib.import_module(f"sinkexport.graph.passes.{name}")
    found: type[GraphPass] = getattr(module, name.title().replace("_", ""))
    return found


def run_passes(model: ir.Model, names: Iterable[str], context: PassContext) -> bool:
    """Run passes in order; returns whether one of them changed the model.

    `ir.passes.Sequential` does the same, but hides the reason of a refusal behind an error of its own.

    Raises: what a pass raises, UsageError above all.
    """
    modified = False
    for name in names:
        modified |= pass_class(name)(context)(model).modified
    return modified
