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


@dataclasses.dataclass(frozen=True)
class RotarySpec:
    """The rotation that one call of the attention function sees.

    rotary_dim: R, leading dimensions of a head that turn (0: it has no positions).
    interleaved: pairs are neighbours (2i, 2i+1); otherwise (i, i + R/2).
    table: of `ModelRotary.tables`, the name of that which it turns by.
    """

    rotary_dim: int
    interleaved: bool
    table: str = ""


@dataclasses.dataclass(frozen=True)
class RotaryTable:
    """One set of frequencies.

    frequency: int64 [R/2], turns a token in units of 2^-32, so that any position's phase is exact.
    scaling: factor on cos and sin (YaRN's attention factor, arXiv:2309.00071), 1 for most.
    """

    frequency: torch.Tensor
    scaling: float


@dataclasses.dataclass(frozen=True)
class ModelRotary:
    """The rotary embedding of a whole model.

    tables: by the layer type that the model's code asks its embedding for; "" if it asks for none.
    cos_layout: one of ``COS_LAYOUTS``. calls: one spec for each call of the attention function, in their order.
    """

    tables: Mapping[str, RotaryTable]
    cos_layout: str
    calls: tuple[RotarySpec, ...]


def find_rotary(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The one rotary embedding module of a model, or of its adapter: (name, module). None: it has none.

    A model without one has ALiBi, or no positions at all: whatever else it does with positions,
    `sinkexport.families.locality` refuses.

    Raises: UsageError if the model has several.
    """
    found = [(name, m) for name, m in model.named_modules() if name.endswith("rotary_emb") and table_names(m)]
    if not found and has_alibi(model):
        return None
    adapter = find_adapter(model)
    if not found and adapter is not None and adapter.rotary is not None:
        return ROTARY_NAME, adapter.rotary(model)
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
    """Stands in for a model's rotary embedding and hands out the cos and sin that it was given for a layer type."""

    def __init__(self, cos_sin: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        for table, (cos, sin) in cos_sin.items():
            self.register_buffer(f"cos_{table}", cos, persistent=False)
            self.register_buffer(f"sin_{table}", sin, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        table = kwargs.get("layer_type", args[2] if len(args) > 2 else "")  # after x and position_ids
        return self.get_buffer(f"cos_{table}"), self.get_buffer(f"sin_{table}")


def identity_rotary(rotary: ModelRotary, batch: int, num_tokens: int, dtype: torch.dtype) -> HandedOutRotary:
    """A rotary embedding that turns nothing: x * 1 + rotate_half(x) * 0 is x exactly."""
    ones = {
        name: lay_out(torch.ones(batch, num_tokens, table.frequency.numel(), dtype=dtype), rotary.cos_layout)
        for name, table in rotary.tables.items()
    }
    return HandedOutRotary({name: (one, torch.zeros_like(one)) for name, one in ones.items()})


@contextlib.contextmanager
def replaced_rotary(model: torch.nn.Module, replacement: torch.nn.Module) -> Iterator[None]:
    """Put `replacement` where the model's rotary embedding is, if it has one, and take it away again."""
    found = find_rotary(model)
    if found is None:
        yield
        return
    name, _ = found
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = getattr(parent, attribute, None)  # None: the family's adapter takes what is put there
    setattr(parent, attribute, replacement)
    try:
        yield
    finally:
        if original is None:
            delattr(parent, attribute)
        else:
            setattr(parent, attribute, original)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
    """Rotate the pairs of the first R dimensions of x [..., D] by cos, sin [..., R/2] (RoFormer, arXiv:2104.09864)."""
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    if spec.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def probe_table(original: torch.nn.Module, table: str, capacity: int) -> tuple[RotaryTable, str]:
    """One set of frequencies and the layout of its cos and sin.

    Raises: UsageError if cos and sin are not those of the frequencies, at the first positions and at the last in-cache
        one.
    """
    rotary = copy.deepcopy(original)  # it changes its frequencies by the positions that it is asked for
    prefix, layer_type = (f"{table}_", {"layer_type": table}) if table else ("", {})
    # The last position says how long the text is.
    positions = torch.tensor([[0, 1, 5, max(5, capacity - 1)]])
    with torch.no_grad():
        rotary(torch.zeros(1, 1, 1), positions[:, :1], **layer_type)  # forget a longer text that came before
        cos, sin = (x.double() for x in rotary(torch.zeros(1, 4, 1), positions, **layer_type))
    inv_freq = rotary.get_buffer(f"{prefix}inv_freq").double()  # [R/2], radians a token
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    angles = positions[..., None].double() * inv_freq  # [1, 4, R/2]
    # transformers multiplies in float32: an angle is wrong by up to 2^-24 of itself, and once more by its rounding.
    tolerance = (1e-4 + positions[..., None] * inv_freq.abs().max() * 2.0**-22) * abs(scaling)
    for cos_layout in COS_LAYOUTS:
        want_cos, want_sin = (lay_out(v * scaling, cos_layout) for v in (angles.cos(), angles.sin()))
        if cos.shape == want_cos.shape and bool(
            ((cos - want_cos).abs() <= tolerance).all() and ((sin - want_sin).abs() <= tolerance).all()
        ):
            frequency = torch.tensor([phase_frequency(float(f)) for f in inv_freq], dtype=torch.int64)
            return RotaryTable(frequency, scaling), cos_layout
    raise refused_rotary(
        f"cos/sin of shape {tuple(cos.shape)} that are not those of its inv_freq", "plain rotary cos/sin"
    )


def refused_rotary(received: str, expected: str) -> UsageError:
    """A refusal of how a model encodes positions."""
    return UsageError(
        problem("rotary positions", received=received, expected=expected, fix="this model cannot be exported exactly")
    )
