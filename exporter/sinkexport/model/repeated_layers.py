"""Leave decoder layers out of a trace that repeat one that is in it.

A layer that is left out is one node of the trace, a mark. Those that are traced begin and end with marks, so that
`sinkexport.graph.stamp_layers` can put copies of them where the other marks are.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import torch
from torch.utils import _pytree as pytree

from sinkexport.model.derived_constants import derived_constants
from sinkexport.model.layer_kinds import LayerRepeats
from sinkexport.util.derived_constant import DerivedConstant


class CannotRepeatError(Exception):
    """Layers that seemed to be alike are not, or not surely: all have to be traced."""


class Mark(enum.IntEnum):
    """Roles of a mark: what it is put at, or stands for."""

    BEGIN = 0
    END = 1
    LEFT_OUT = 2


@torch.library.custom_op("sinkexport::layer_mark", mutates_args=())
def layer_mark(hidden: torch.Tensor, layer: int, role: int) -> torch.Tensor:  # noqa: ARG001
    """hidden [B, T, N] as it is. role: a `Mark`."""
    return hidden.clone()


@layer_mark.register_fake
def _(hidden: torch.Tensor, _layer: int, _role: int) -> torch.Tensor:
    return torch.empty_like(hidden)


COMPARABLE = (bool, int, float, str, type(None), pytree.TreeSpec, torch.dtype)
"""Types of arguments that are alike if they are equal."""


class Pass(Protocol):
    """A forward pass whose layers may be left out."""

    num_calls: int

    def leave_out(self, layer: int) -> None:
        """Hand on the states of a layer as they are."""


class LeftOut:
    """One forward pass: `attend` is to be called in the place of the one given, inside the context of `in_place`."""

    def __init__(self, repeats: LayerRepeats | None, step: Pass, attend: Callable[..., Any]) -> None:
        """repeats: None: no layer is left out."""
        self._repeats = repeats
        self._step = step
        self._attend = attend
        self.is_attending = False
        """Whether this project's code runs, which may read a layer's index."""
        self._given: dict[int, list[Any]] = {}  # by layer, all that it was called with but its hidden states
        self._returned: dict[int, tuple[list[Any], Any]] = {}  # by template, all but hidden states, and the form

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """The attention function."""
        self.is_attending = True
        try:
            return self._attend(*args, **kwargs)
        finally:
            self.is_attending = False

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Mark the layers of kinds that repeat, and leave out all but two of each.

        Raises: CannotRepeatError if a layer is called in another way than its template.
        """
        if self._repeats is None:
            yield
            return
        repeats = self._repeats
        with contextlib.ExitStack() as stack:
            for layer in repeats.traced:
                stack.enter_context(_replaced(repeats.layers[layer], "forward", self._marked(repeats, layer)))
            for layer, template in repeats.template_of.items():
                forward = self._left_out(layer, template)
                stack.enter_context(_replaced(repeats.layers[layer], "forward", forward))
            yield
        if missing := {*repeats.traced, *repeats.template_of} - self._given.keys():
            raise CannotRepeatError(f"layers {sorted(missing)} were not called")

    def _marked(self, repeats: LayerRepeats, layer: int) -> Callable[..., Any]:
        """`forward` of a layer that is traced."""
        forward = repeats.layers[layer].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, others, tree = self._take(layer, args, kwargs)
            first_call = self._step.num_calls
            args, kwargs = pytree.tree_unflatten([layer_mark(hidden, layer, Mark.BEGIN), *others], tree)
            with contextlib.ExitStack() as stack:
                for module, name in repeats.numbers[layer]:
                    stack.enter_context(_replaced(module, name, _Number(vars(module)[name], self)))
                (result, *more), form = pytree.tree_flatten(forward(*args, **kwargs))
            if self._step.num_calls != first_call + 1:
                raise CannotRepeatError(f"layer {layer} attends {self._step.num_calls - first_call} times")
            is_hidden = isinstance(result, torch.Tensor) and (result.shape, result.dtype) == (
                hidden.shape,
                hidden.dtype,
            )
            if not is_hidden or any(isinstance(one, torch.Tensor) for one in more):
                raise CannotRepeatError(f"layer {layer} returns something else than hidden states")
            self._returned[layer] = more, form
            return pytree.tree_unflatten([layer_mark(result, layer, Mark.END), *more], form)

        return run

    def _left_out(self, layer: int, template: int) -> Callable[..., Any]:
        """`forward` of a layer that is left out."""

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, _others, _tree = self._take(layer, args, kwargs)
            given = self._given.get(template)
            if given is None or not _same_arguments(given, self._given[layer]):
                raise CannotRepeatError(f"layer {layer} is called with other arguments than layer {template}")
            self._step.leave_out(layer)
            more, form = self._returned[template]
            return pytree.tree_unflatten([layer_mark(hidden, layer, Mark.LEFT_OUT), *more], form)

        return run

    def _take(self, layer: int, args: Any, kwargs: Any) -> tuple[torch.Tensor, list[Any], Any]:
        """Hidden states, all other arguments and their form, which are remembered."""
        (hidden, *others), tree = pytree.tree_flatten((args, kwargs))
        if layer in self._given:
            raise CannotRepeatError(f"layer {layer} is called twice")
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or not hidden.is_floating_point():
            raise CannotRepeatError(f"layer {layer} is not called with hidden states first")
        self._given[layer] = [tree, *others]
        return hidden, others, tree


class _Number:
    """Stands for an integer in which layers differ, such as their index: the layer's code must not read it."""

    def __init__(self, value: int, run: LeftOut) -> None:
        self._value = value
        self._run = run

    def __int__(self) -> int:
        if not self._run.is_attending:
            raise CannotRepeatError("a layer's code reads its index")
        return self._value

    def _read(self, *_: Any) -> NoReturn:
        raise CannotRepeatError("a layer's code reads its index")

    __class__ = property(lambda _: int)  # code that asks for the type goes on, and reads it
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _read
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _read
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __divmod__ = __rdivmod__ = _read
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = _read
    __rrshift__ = __neg__ = __pos__ = __abs__ = __invert__ = __round__ = _read
    __index__ = __float__ = __complex__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = _read


def _same_arguments(given: list[Any], others: list[Any]) -> bool:
    """Whether two layers are called alike: with the same tensors and objects, and equal numbers."""
    return len(given) == len(others) and all(
        one is other or (type(one) is type(other) and isinstance(one, COMPARABLE) and one == other)
        for one, other in zip(given, others, strict=True)
    )


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put an attribute of its own on an object inside a context."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


def repeated_constants(
    program: torch.export.ExportedProgram, repeats: LayerRepeats, traced: Sequence[DerivedConstant]
) -> list[DerivedConstant]:
    """Constants of the layers that are left out of a trace, see `derived_constants`: of each its own parameters.

    traced: those of the trace itself.
    """
    found = []
    for layer, template in repeats.template_of.items():
        prefix = repeats.prefix(template)
        has_buffers = any(prefix in name for name in program.constants)
        if not any(_is_of_layer(constant, prefix, has_buffers) for constant in traced):
            continue

        def of_layer(tensors: Mapping[str, Any], layer: int = layer, template: int = template) -> dict[str, Any]:
            return {name: tensors.get(repeats.renamed(name, template, layer), one) for name, one in tensors.items()}

        its_own = SimpleNamespace(
            graph_signature=program.graph_signature,
            graph_module=program.graph_module,
            state_dict=of_layer(program.state_dict),
            constants=of_layer(program.constants),
        )
        for constant in derived_constants(its_own):
            if _is_of_layer(constant, prefix, has_buffers):
                names = {repeats.renamed(name, template, layer): one for name, one in constant.sources.items()}
                found.append(DerivedConstant(constant.values, names))
    return found


def _is_of_layer(constant: DerivedConstant, prefix: str, has_buffers: bool) -> bool:
    """Whether a constant of a trace may be that of the layer whose names begin so. has_buffers: of its own."""
    return any(prefix in name for name in constant.sources) if constant.sources else has_buffers
