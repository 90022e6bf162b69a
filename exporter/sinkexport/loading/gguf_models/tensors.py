"""Tensors of a GGUF file as parameters of a transformers model: each used once, none missing, none made up."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sinkexport.loading.gguf_models.facts import Facts, refused

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 22
"""gguf-py needs several times what it makes: so much is dequantised at once."""

Build = Callable[[Sequence[Any]], Any]
"""Makes a parameter (NumPy float32) of the dequantised tensors that it is made of."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Parameters of the model and the tensors they are made of, in order.

    build: None: the tensor as it is. Several parameters take the first, second .. row of what is built.
    """

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    build: Build | None = None


@dataclasses.dataclass(frozen=True)
class Module:
    """Place of a module's weight and bias in a file.

    gguf, hf: names without ``.weight``; ``{i}`` is the layer. build: of the weight, and of the bias if `both`.
    optional_bias: a model that has a bias there takes zeros, where the file has none in any layer, nor any in the
    modules that have theirs `together` with it.
    """

    gguf: str
    hf: str
    build: Build | None = None
    optional_bias: bool = False
    both: bool = True
    together: tuple[str, ...] = ()


def module_rules(facts: Facts, modules: Iterable[Module]) -> Iterator[Rule]:
    """A rule for each weight and each bias that the file has of `modules`."""
    for module in modules:
        for layer in range(facts.num_layers) if "{i}" in module.gguf else [0]:
            for suffix in ("weight", "bias"):
                tensor = f"{module.gguf.format(i=layer)}.{suffix}"
                if tensor in facts.tensors:
                    build = module.build if suffix == "weight" or module.both else None
                    yield Rule((f"{module.hf.format(i=layer)}.{suffix}",), (tensor,), build)


def fill(model: Any, facts: Facts, modules: Sequence[Module], rules: Iterable[Rule]) -> None:
    """Give every parameter of `model` its values. rules: those beside the `modules`. The model has passed `check`.

    Raises: UsageError for a shape that is not as the metadata say.
    """
    import torch

    parameters = _to_fill(model)
    every = [*module_rules(facts, modules), *rules]
    have = {name for rule in every for name in rule.parameters}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name not in have:
                parameter.zero_()  # `check` has let no other than optional biases through
        for rule in every:
            for name, values in _built(rule, facts):
                if tuple(values.shape) != tuple(parameters[name].shape):
                    shapes = ", ".join(f"'{tensor}' {facts.shape(tensor)}" for tensor in rule.tensors)
                    raise refused(
                        f"{shapes} for {name} {tuple(parameters[name].shape)}", "the shapes that the metadata give"
                    )
                parameters[name].copy_(_as_torch(values))


def check(model: Any, facts: Facts, modules: Sequence[Module], rules: Iterable[Rule], used: Iterable[str]) -> None:
    """Compare tensors with a model that may be without memory (meta device): names, and how much each holds.

    rules: those beside the `modules`. used: tensors that the configuration was made of.
    Raises: UsageError if a tensor is left over or used twice, a parameter has none, or their sizes differ.
    """
    parameters = _to_fill(model)
    every = [*module_rules(facts, modules), *rules]
    _account(parameters, facts, modules, every, used)
    for rule in every:
        here = sum(math.prod(facts.shape(tensor)) for tensor in rule.tensors)
        wanted = sum(parameters[name].numel() for name in rule.parameters)
        if here != wanted:
            shapes = ", ".join(f"'{tensor}' {facts.shape(tensor)}" for tensor in rule.tensors)
            raise refused(
                f"{shapes} for {rule.parameters[0]} {tuple(parameters[rule.parameters[0]].shape)}",
                "the shapes that the metadata give",
                "download the file again",
            )


def _to_fill(model: Any) -> dict[str, torch.Tensor]:
    """Parameters by name, a tied one once, and the buffers that belong to a checkpoint."""
    kept = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if k in kept}}


def _built(rule: Rule, facts: Facts) -> Iterator[tuple[str, Any]]:
    """Names of parameters and their values."""
    parts = [dequantised(facts.tensors[tensor]) for tensor in rule.tensors]
    try:
        values = rule.build(parts) if rule.build else parts[0]
    except ValueError:  # NumPy's, for shapes that do not fit each other
        values = parts[0]
    if len(rule.parameters) == 1:
        yield rule.parameters[0], values
        return
    if len(values) != len(rule.parameters):
        raise refused(
            f"tensor '{rule.tensors[0]}' of shape {facts.shape(rule.tensors[0])}", f"{len(rule.parameters)} rows"
        )
    yield from zip(rule.parameters, values, strict=True)


def dequantised(tensor: Any) -> Any:
    """The values of gguf's ReaderTensor: NumPy float32 [rows.., columns].

    Raises: UsageError for a type that gguf-py cannot dequantise.
    """
    import gguf
    import numpy as np

    shape = [int(size) for size in reversed(tensor.shape)]
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    result = np.empty((len(rows), shape[-1]), dtype=np.float32)
    step = max(1, CHUNK_ELEMENTS // shape[-1])
    try:
        for begin in range(0, len(rows), step):
            result[begin : begin + step] = gguf.dequantize(rows[begin : begin + step], tensor.tensor_type)
    except NotImplementedError:
        raise refused(
            f"tensor '{tensor.name}' of type {tensor.tensor_type.name}",
            "a type that gguf-py dequantises",
            "quantise the model otherwise",
        ) from None
    return result.reshape(shape)


def unpermute(num_heads: int) -> Build:
    """Rows of queries or keys [heads * D, ..]: llama.cpp pairs neighbours, transformers halves of a head."""

    def build(parts: Sequence[Any]) -> Any:
        (rows,) = parts
        by_pair = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
        return by_pair.swapaxes(1, 2).reshape(rows.shape)

    return build


def minus_one(parts: Sequence[Any]) -> Any:
    """Weights of a norm whose model adds 1 to them."""
    return parts[0] - 1


def stacked(parts: Sequence[Any]) -> Any:
    """One after another along the rows."""
    import numpy as np

    return np.concatenate(parts, axis=0)


def gate_and_up(parts: Sequence[Any]) -> Any:
    """Experts' gates and ups, each [E, I, H], as [E, 2I, H]."""
    import numpy as np

    return np.concatenate(parts, axis=1)


def by_groups(num_groups: int, queries_a_group: int) -> Build:
    """Fused queries, keys and values: from all queries, all keys, all values to those of each group of heads."""

    def build(parts: Sequence[Any]) -> Any:
        import numpy as np

        (rows,) = parts
        head_dim = rows.shape[0] // (num_groups * (queries_a_group + 2))
        ends = [num_groups * queries_a_group * head_dim, num_groups * (queries_a_group + 1) * head_dim]
        pieces = [piece.reshape(num_groups, -1, head_dim, *rows.shape[1:]) for piece in np.split(rows, ends, axis=0)]
        return np.concatenate(pieces, axis=1).reshape(rows.shape)

    return build


def _account(
    parameters: Mapping[str, Any], facts: Facts, modules: Sequence[Module], rules: Sequence[Rule], used: Iterable[str]
) -> None:
    """Check that every tensor goes to one parameter of the model and that every parameter has its tensors.

    Raises: UsageError that names them.
    """
    seen = set(used)
    for rule in rules:
        for tensor in rule.tensors:
            if tensor not in facts.tensors:
                raise refused(f"no tensor '{tensor}'", f"those of {rule.parameters[0]}", "download the file again")
            if tensor in seen:
                raise refused(f"tensor '{tensor}' for more than one parameter", "each tensor once")
            seen.add(tensor)
    have = {name for rule in rules for name in rule.parameters}
    for name in parameters:
        if name not in have and not _may_be_zero(name, facts, modules):
            raise refused(f"no tensor '{_gguf_name(name, modules)}'", f"one for {name}", "download the file again")
    unknown = [tensor for tensor in facts.tensors if tensor not in seen]
    unknown += [rule.tensors[0] for rule in rules if not parameters.keys() >= set(rule.parameters)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise refused(
            f"tensor '{unknown[0]}'{more}, which '{facts.architecture}' has no place for",
            "only tensors of this architecture",
        )


def _may_be_zero(parameter: str, facts: Facts, modules: Sequence[Module]) -> bool:
    module = _module_of(parameter.removesuffix(".bias"), modules)
    if module is None or not module.optional_bias or not parameter.endswith(".bias"):
        return False
    return not any(facts.has(f"{name}.bias") for name in (module.gguf, *module.together))


def _gguf_name(parameter: str, modules: Sequence[Module]) -> str:
    name, _, suffix = parameter.rpartition(".")
    module, layer = _module_of(name, modules), re.search(r"\.(\d+)\.", parameter)
    return f"{module.gguf.format(i=layer[1] if layer else 0)}.{suffix}" if module else f"of {parameter}"


def _module_of(name: str, modules: Sequence[Module]) -> Module | None:
    return next((m for m in modules if re.fullmatch(re.escape(m.hf).replace(r"\{i\}", r"\d+"), name)), None)


def _as_torch(values: Any) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))
