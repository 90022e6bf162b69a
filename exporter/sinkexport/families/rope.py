"""A model's rotary embedding: its frequencies, how it lays out cos and sin, and how to put another in its place.

Which numbers a layer turns, and by which table, is found out by `sinkexport.families.probe`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from sinkrt.errors import UsageError, problem
from sinkrt.ring import phase_frequency

from sinkexport.families.adapters import ROTARY_NAME, find_adapter, has_alibi

COS_LAYOUTS = ("halves", "neighbours", "single")
"""Layouts of cos and sin over the last axis: (f, f), each of f twice in a row, or f alone."""

COMPLEX = "complex"
"""The layout of one tensor cos + i sin, f alone over its last axis."""

HANDED_COS, HANDED_SIN, HANDED_COMPLEX = "handed_out_cos_", "handed_out_sin_", "handed_out_complex_"
"""Beginnings of the names of the buffers of `HandedOutRotary`."""


@dataclasses.dataclass(frozen=True)
class RotarySpec:
    """The rotation that one attention call applies.

    rotary_dim: R, dimensions of a head that turn (0: the call has no positions).
    interleaved: pairs are neighbours (2i, 2i+1); otherwise (i, i + R/2). The first R dimensions are these pairs.
    table: of `ModelRotary.tables`, the name of that which the call turns by.
    order: [D], the dimensions of the model's own heads in that order; None: as they are.
    norms: modules of queries and of keys, by name, whose weights are multiplied after the rotation; None: there are
    none. What attends is then the queries and keys before those weights, see `sinkexport.families.weights_after`.
    """

    rotary_dim: int
    interleaved: bool
    table: str = ""
    order: tuple[int, ...] | None = None
    norms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RotaryTable:
    """One set of frequencies.

    frequency: int64 [R/2], turns a token in units of 2^-32, so that any position's phase is exact.
    scaling: factor on cos and sin (YaRN's attention factor, arXiv:2309.00071), 1 for most.
    module: name of the rotary embedding that has it. layer_type: that it is asked for; "": it has one table.
    cos_layout: one of ``COS_LAYOUTS``, or ``COMPLEX``.
    """

    frequency: torch.Tensor
    scaling: float
    module: str = ""
    layer_type: str = ""
    cos_layout: str = COS_LAYOUTS[0]

    def is_same(self, other: RotaryTable) -> bool:
        """Whether both turn alike."""
        return self.scaling == other.scaling and torch.equal(self.frequency, other.frequency)


HIDDEN = torch.tensor([1.5, -0.25, 4.0, -3.0])[None, :, None]
"""Hidden states [1, 4, 1] of no model: a rotary embedding may read their type."""


@dataclasses.dataclass(frozen=True)
class ModelRotary:
    """All that positions do in a model.

    tables: of its only rotary embedding by the layer type that the model's code asks it for ("" if it asks for none);
    of several by their number as well. calls: one spec an attention call, in the order of a forward pass.
    query_scales: by attention call, float64 [C], factors on a query by its in-cache position, relative to the first,
    where the model reads that position off its cache; see `sinkexport.families.query_scale`.
    """

    tables: Mapping[str, RotaryTable]
    calls: tuple[RotarySpec, ...]
    query_scales: Mapping[int, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def norms(self) -> frozenset[str]:
        """All modules whose weights are left out where queries and keys are made."""
        return frozenset(name for spec in self.calls for name in spec.norms)


def rotary_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """All rotary embeddings of a model, or that of its adapter, by name."""
    found = {name: module for name, module in model.named_modules() if table_names(module)}
    adapter = find_adapter(model)
    if not found and not has_alibi(model) and adapter is not None and adapter.rotary is not None:
        return {ROTARY_NAME: adapter.rotary(model)}
    return found


def find_rotary(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The one rotary embedding module of a model, or of its adapter: (name, module). None: it has none.

    A model without one has ALiBi, or no positions at all: whatever else it does with positions,
    `sinkexport.families.locality` refuses.

    Raises: UsageError if the model has several.
    """
    found = list(rotary_modules(model).items())
    if len(found) > 1:
        raise refused_rotary(f"{len(found)} rotary embeddings", "one that all layers share, or none")
    return found[0] if found else None


def table_names(rotary: torch.nn.Module) -> list[str]:
    """Layer types that a rotary embedding has frequencies of; "" for those of all layers."""
    names = [name for name, _ in rotary.named_buffers(recurse=False)]
    return [
        name.removesuffix("inv_freq").removesuffix("_")
        for name in names
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    ]


def lay_out(values: torch.Tensor, cos_layout: str) -> torch.Tensor:
    """Spread per-pair values [..., R/2] over the last axis as the family expects its cos and sin."""
    if cos_layout == "halves":
        return torch.cat((values, values), dim=-1)  # [..., R]
    if cos_layout == "neighbours":
        return values.repeat_interleave(2, dim=-1)  # [..., R]
    return values  # [..., R/2]


class HandedOutRotary(torch.nn.Module):
    """Stands in for a rotary embedding and hands out the cos and sin that it was given for a layer type.

    Whatever else a model's code reads of its rotary embedding is read off the original, which `replaced_rotary` sets.
    """

    def __init__(self, cos_sin: Mapping[str, tuple[torch.Tensor, torch.Tensor]], cos_layout: str) -> None:
        """cos_sin: by layer type, [.., R/2] each."""
        super().__init__()
        self._layer_types = tuple(cos_sin)
        self._is_complex = cos_layout == COMPLEX
        for layer_type, (cos, sin) in cos_sin.items():
            if self._is_complex:
                at_least_float32 = torch.promote_types(cos.dtype, torch.float32)
                handed = torch.complex(cos.to(at_least_float32), sin.to(at_least_float32))
                self.register_buffer(HANDED_COMPLEX + layer_type, handed, persistent=False)
            else:
                self.register_buffer(HANDED_COS + layer_type, lay_out(cos, cos_layout), persistent=False)
                self.register_buffer(HANDED_SIN + layer_type, lay_out(sin, cos_layout), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """cos and sin, or one complex tensor, as the original."""
        layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else "")  # after x and position_ids
        if self._layer_types == ("",):
            layer_type = ""
        if self._is_complex:
            return self.get_buffer(HANDED_COMPLEX + layer_type)
        return self.get_buffer(HANDED_COS + layer_type), self.get_buffer(HANDED_SIN + layer_type)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if (original := self.__dict__.get("original")) is None:
                raise
            return getattr(original, name)


Replacements = Mapping[str, torch.nn.Module]
"""What stands in for a model's rotary embeddings, by their names."""


def handed_out(
    tables: Mapping[str, RotaryTable], cos_sin: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Replacements:
    """Rotary embeddings that hand out cos and sin [.., R/2], by table."""
    modules: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    layouts: dict[str, str] = {}
    for name, table in tables.items():
        modules.setdefault(table.module, {})[table.layer_type] = cos_sin[name]
        layouts[table.module] = table.cos_layout
    return {module: HandedOutRotary(of_types, layouts[module]) for module, of_types in modules.items()}


def identity_rotary(rotary: ModelRotary, batch: int, num_tokens: int, dtype: torch.dtype) -> Replacements:
    """Rotary embeddings that turn nothing: x * 1 + rotate_half(x) * 0 is x exactly."""
    ones = {
        name: torch.ones(batch, num_tokens, table.frequency.numel(), dtype=dtype)
        for name, table in rotary.tables.items()
    }
    return handed_out(rotary.tables, {name: (one, torch.zeros_like(one)) for name, one in ones.items()})


@contextlib.contextmanager
def replaced_rotary(model: torch.nn.Module, replacements: Replacements) -> Iterator[None]:
    """Put `replacements` where the model's rotary embeddings of these names are, and take them away again.

    An embedding that several modules share is replaced everywhere.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    before: list[tuple[torch.nn.Module, str, torch.nn.Module | None]] = []
    try:
        for name, replacement in replacements.items():
            original = modules.get(name)  # None: the family's adapter takes what is put there
            if original is not None and isinstance(replacement, HandedOutRotary):
                replacement.__dict__["original"] = original  # not a part of it
            places = [name] if original is None else [other for other, one in modules.items() if one is original]
            for place in places:
                parent_name, _, attribute = place.rpartition(".")
                before.append((modules[parent_name], attribute, original))
                setattr(modules[parent_name], attribute, replacement)
        yield
    finally:
        for parent, attribute, original in before:
            if original is None:
                delattr(parent, attribute)
            else:
                setattr(parent, attribute, original)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
    """Rotate the pairs of x [..., D] by cos, sin [..., R/2] (RoFormer, arXiv:2104.09864)."""
    if spec.order is not None:
        order = torch.tensor(spec.order)
        return rotate(x[..., order], cos, sin, dataclasses.replace(spec, order=None))[..., order.argsort()]
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    if spec.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def probe_table(original: torch.nn.Module, module: str, layer_type: str, capacity: int) -> RotaryTable:
    """One set of frequencies of the rotary embedding called `module`.

    Raises: UsageError if cos and sin are not those of the frequencies, at the first positions and at the last in-cache
        one; if they are not finite; if hidden states change them.
    """
    rotary = copy.deepcopy(original)  # it changes its frequencies by the positions that it is asked for
    prefix, named = (f"{layer_type}_", {"layer_type": layer_type}) if layer_type else ("", {})
    # The last position says how long the text is.
    positions = torch.tensor([[0, 1, 5, max(5, capacity - 1)]])
    with torch.no_grad():
        rotary(torch.zeros(1, 1, 1), positions[:, :1], **named)  # forget a longer text that came before
        handed = rotary(torch.zeros(1, 4, 1), positions, **named)
        again = rotary(HIDDEN.clone(), positions, **named)
    pairs = [*zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (handed, again)), strict=True)]
    if not all(bool(x.isfinite().all()) for x, _ in pairs):
        raise refused_rotary("cos and sin that are NaN or Inf", "finite numbers; see rope_parameters in config.json")
    if not all(torch.equal(one, other) for one, other in pairs):
        raise refused_rotary("cos and sin that hidden states change", "those of positions alone")
    is_complex = isinstance(handed, torch.Tensor) and handed.is_complex()
    cos, sin = (x.double() for x in ((handed.real, handed.imag) if is_complex else handed))
    inv_freq = rotary.get_buffer(f"{prefix}inv_freq").double()  # [R/2], radians a token
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    angles = positions[..., None].double() * inv_freq  # [1, 4, R/2]
    # transformers multiplies in float32: an angle is wrong by up to 2^-24 of itself, and once more by its rounding.
    tolerance = (1e-4 + positions[..., None] * inv_freq.abs().max() * 2.0**-22) * abs(scaling)
    for cos_layout in (COMPLEX,) if is_complex else COS_LAYOUTS:
        want_cos, want_sin = (lay_out(v * scaling, cos_layout) for v in (angles.cos(), angles.sin()))
        if cos.shape == want_cos.shape and bool(
            ((cos - want_cos).abs() <= tolerance).all() and ((sin - want_sin).abs() <= tolerance).all()
        ):
            frequency = torch.tensor([phase_frequency(float(f)) for f in inv_freq], dtype=torch.int64)
            return RotaryTable(frequency, scaling, module, layer_type, cos_layout)
    raise refused_rotary(
        f"cos/sin of shape {tuple(cos.shape)} that are not those of its inv_freq", "plain rotary cos/sin"
    )


def refused_rotary(received: str, expected: str) -> UsageError:
    """A refusal of how a model encodes positions."""
    return UsageError(
        problem("rotary positions", received=received, expected=expected, fix="this model cannot be exported exactly")
    )
