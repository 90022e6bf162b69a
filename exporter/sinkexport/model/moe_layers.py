"""MoE layers of a model, and the modules that choose their experts: what recipes treat in a way of its own."""

from __future__ import annotations

from typing import Any

from sinkexport.model.experts import declared_experts
from sinkexport.model.loop_experts import loop_experts


def moe_layers(model: Any) -> dict[str, int]:
    """Names of a model's MoE layers, and how many experts each has."""
    return {name: module.num_experts for name, module in declared_experts(model).items()} | loop_experts(model)


def routers(model: Any) -> frozenset[str]:
    """Names of the modules that choose experts: those with one output for each expert of an MoE layer.

    They are its neighbours, its children, or the one matrix of such a module.
    """
    found = set()
    for path, num_experts in moe_layers(model).items():
        parent = path.rpartition(".")[0]
        for place in (parent, path):
            for name, module in model.get_submodule(place).named_children():
                inner = [(f"{name}.{child}", one) for child, one in module.named_children()]
                candidates = [(name, module), *(inner if len(inner) == 1 else ())]
                found |= {f"{place}.{name}" for name, one in candidates if _has_outputs(one, num_experts)}
    return frozenset(found)


def _has_outputs(module: Any, count: int) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and weight.shape[0] == count
