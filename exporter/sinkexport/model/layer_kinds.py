"""Which decoder layers of a model run the same code: they differ in the numbers of their parameters alone."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sinkexport.model.decoder import StreamStep

MIN_ALIKE = 3
"""Layers of a kind from which on a trace leaves some out: two are always traced, to be compared."""

Attribute = tuple[torch.nn.Module, str]
"""A module and the name of one of its attributes."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRepeats:
    """Layers that need no trace of their own.

    path: name of the list of decoder layers in the model. layers: its modules.
    template_of: by layer that is left out, the layer whose trace it takes over. first_of: by template, the first layer
    of the kind, whose trace must be like the template's.
    numbers: by layer that is traced, attributes that tell it from others of its kind, such as its index.
    """

    path: str
    layers: tuple[torch.nn.Module, ...]
    template_of: dict[int, int]
    first_of: dict[int, int]
    numbers: dict[int, tuple[Attribute, ...]]

    @property
    def traced(self) -> list[int]:
        """Layers of kinds that repeat, whose traces are taken."""
        return sorted({*self.first_of, *self.first_of.values()})

    def prefix(self, layer: int) -> str:
        """Beginning of the names of a layer's parameters in the model."""
        return f"{self.path}.{layer}."

    def renamed(self, name: str, template: int, layer: int) -> str:
        """The name in `layer` of a parameter of the layer `template`, under whatever the model is a part of."""
        return name.replace(self.prefix(template), self.prefix(layer), 1)


def layer_repeats(stream: StreamStep) -> LayerRepeats | None:
    """Find the layers of a model that repeat others. None: every layer is traced.

    Layers are of one kind if their modules have the same types and attributes, parameters of the same shapes that no
    other layer has, and one attention call of the same sizes, rotation and cache. Attributes that are integers may
    differ, such as a layer's index: the trace then fails where the code reads them (model/repeated_layers.py). Models
    with states beside attention or with latents have no layers that repeat.
    """
    lists = [
        (name, module)
        for name, module in stream.model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == stream.shape.num_layers
    ]
    has_cache = bool(stream.shape.recurrent) or any(call.latent is not None for call in stream.shape.calls)
    if len(lists) != 1 or stream.shape.num_layers < MIN_ALIKE or has_cache:  # a cache is asked by a layer's index
        return None
    path, layers = lists[0][0], tuple(lists[0][1])
    own = _layers_with_own_tensors(stream.model, path, len(layers))
    kinds: list[tuple[tuple[Any, ...], list[int]]] = []
    numbers: dict[int, set[str]] = {}  # by first layer of a kind, attributes by their paths in the layer
    for index, layer in enumerate(layers):
        call = _call(stream, path, index)
        if index not in own or call is None:
            continue
        for key, members in kinds:
            differing = None if key != call else _differing_numbers(layers[members[0]], layer)
            if differing is not None:
                members.append(index)
                numbers[members[0]] |= differing
                break
        else:
            kinds.append((call, [index]))
            numbers[index] = set()
    kinds = [(key, members) for key, members in kinds if len(members) >= MIN_ALIKE]
    if not kinds:
        return None
    return LayerRepeats(
        path=path,
        layers=layers,
        template_of={layer: members[1] for _, members in kinds for layer in members[2:]},
        first_of={members[1]: members[0] for _, members in kinds},
        numbers={
            layer: tuple(_attribute(layers[layer], name) for name in sorted(numbers[members[0]]))
            for _, members in kinds
            for layer in members[:2]
        },
    )


def _layers_with_own_tensors(model: torch.nn.Module, path: str, num_layers: int) -> set[int]:
    """Layers whose parameters and buffers no other part of the model has."""
    holders: dict[int, set[str]] = {}
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for name, tensor in tensors:
        inside = name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else ""
        holders.setdefault(id(tensor), set()).add(inside.partition(".")[0])
    shared = {holder for one in holders.values() if len(one) > 1 for holder in one}
    return {layer for layer in range(num_layers) if str(layer) not in shared}


def _call(stream: StreamStep, path: str, layer: int) -> tuple[Any, ...] | None:
    """What the attention of a layer depends on beside its modules. None: more than can be compared."""
    shape, rotary = stream.shape, stream.rotary
    calls = [(number, call) for number, call in enumerate(shape.calls) if call.layer == layer]
    if len(calls) != 1:
        return None
    number, call = calls[0]
    is_shared = call.shares is not None or any(other.shares == number for other in shape.calls)
    is_varied = stream.sink_scale(layer) is not None or stream.calibrated(layer) is not None
    if is_shared or is_varied or str(layer) in stream.affine or number in rotary.query_scales:
        return None
    caches = tuple(dataclasses.replace(cache, layer=0, call=0) for cache in stream.caches_of_call[number])
    spec, prefix = rotary.calls[number], f"{path}.{layer}."
    spec = dataclasses.replace(spec, norms=tuple(name.replace(prefix, "", 1) for name in spec.norms))
    return dataclasses.replace(call, layer=0), caches, spec


def _differing_numbers(a: torch.nn.Module, b: torch.nn.Module) -> set[str] | None:
    """Paths of integers that differ between two layers. None: they differ in something else."""
    found: set[str] = set()
    return found if _are_alike(found, "", a, b) else None


def _are_alike(found: set[str], path: str, a: torch.nn.Module | None, b: torch.nn.Module | None) -> bool:
    """Whether two modules differ in numbers of tensors and in `found` alone, to which paths of integers are added."""
    if a is None or b is None:
        return a is b
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys() or list(a._modules) != list(b._modules):
        return False
    for name, one in vars(a).items():
        other = vars(b)[name]
        if name in ("_parameters", "_buffers"):
            if one.keys() != other.keys() or not all(_same_form(one[key], other[key]) for key in one):
                return False
        elif name == "_modules":
            continue
        elif type(one) is int and type(other) is int and one != other:
            found.add(f"{path}{name}")
        elif not _same_value(one, other, a, b):
            return False
    return all(_are_alike(found, f"{path}{name}.", child, b._modules[name]) for name, child in a._modules.items())


def _same_form(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two parameters or buffers are alike but for their numbers."""
    if a is None or b is None:
        return a is b
    return type(a) is type(b) and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _same_value(a: Any, b: Any, owner_a: Any, owner_b: Any) -> bool:
    """Whether two attributes are one object, equal plain values or the same method of their owners."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return a == b
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same_value(a[key], b[key], owner_a, owner_b) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same_value(x, y, owner_a, owner_b) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset):
        return a == b and all(isinstance(one, _PLAIN) for one in a)
    if isinstance(a, torch.Tensor):
        return _same_form(a, b) and torch.equal(a, b)
    if isinstance(a, functools.partial):
        parts = ((a.func, b.func), (a.args, b.args), (a.keywords, b.keywords))
        return all(_same_value(x, y, owner_a, owner_b) for x, y in parts)
    if inspect.ismethod(a):
        return a.__func__ is b.__func__ and a.__self__ is owner_a and b.__self__ is owner_b
    return False


def _attribute(layer: torch.nn.Module, path: str) -> Attribute:
    module, _, name = path.rpartition(".")
    return layer.get_submodule(module), name
