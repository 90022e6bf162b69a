"""How a model attends and rotates: read off the model itself, never assumed.

A family's rotary code differs in which numbers form a pair (halves or neighbours), how many dimensions turn and
how cos and sin are laid out. Instead of a table of families, `probe_rotary` runs the model once on two copies of
a token: one copy sees no rotation (cos = 1, sin = 0), the other a known one. What the attention function receives
tells shapes and layout, and a layout that is not recognised is refused, so a guess can never reach a bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.errors import UsageError, problem
from sinkrt.ring import phase_frequency

from sinkexport.model.interface import intercept_attention


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Facts of one model's attention, the same in all layers."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


COS_LAYOUTS = ("halves", "neighbours", "single")
"""How a family lays out cos and sin over the last axis: (f, f), each of f twice in a row, or f alone."""


@dataclasses.dataclass(frozen=True)
class RotarySpec:
    """The rotation that one layer applies.

    rotary_dim: R, leading dimensions of a head that turn (0: the layer has no positions).
    interleaved: pairs are neighbours (2i, 2i+1); otherwise (i, i + R/2).
    """

    rotary_dim: int
    interleaved: bool


@dataclasses.dataclass(frozen=True)
class ModelRotary:
    """The rotary embedding of a whole model.

    frequency: int64 [R/2], turns a token in units of 2^-32, so that any position's phase is exact.
    scaling: factor on cos and sin (YaRN's attention factor, arXiv:2309.00071), 1 for most.
    cos_layout: one of ``COS_LAYOUTS``. layers: one spec a layer, by layer index.
    """

    frequency: torch.Tensor
    scaling: float
    cos_layout: str
    layers: tuple[RotarySpec, ...]


def find_rotary(model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """The one rotary embedding module of a model: (name, module).

    Raises: UsageError if the model has none or several.
    """
    found = [(name, m) for name, m in model.named_modules() if name.endswith("rotary_emb") and hasattr(m, "inv_freq")]
    if len(found) != 1:
        raise _refused(
            f"{len(found)} rotary embeddings with one set of frequencies",
            "exactly one that all layers share",
        )
    return found[0]


def probe_attention(model: torch.nn.Module, num_layers: int) -> tuple[AttentionShape, ModelRotary]:
    """Find out the shapes of a model's attention and how it rotates queries and keys.

    Raises: UsageError if layers differ in shape or have no attention, or if cos/sin or the rotation have a layout
    that is not known.
    """
    name, rotary = find_rotary(model)
    inv_freq = rotary.get_buffer("inv_freq").detach().double()  # [R/2], radians a token
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    cos_layout = _probe_cos_layout(rotary, inv_freq, scaling)
    angles = torch.linspace(0.3, 2.7, inv_freq.numel(), dtype=torch.float64)
    queries, keys = _with_and_without(model, name, cos_layout, angles, num_layers)
    layers = tuple(_match_layout(layer, pair, angles) for layer, pair in enumerate(queries))
    frequency = torch.tensor([phase_frequency(float(f)) for f in inv_freq], dtype=torch.int64)
    return _common_shape(queries, keys), ModelRotary(frequency, scaling, cos_layout, layers)


def lay_out(values: torch.Tensor, cos_layout: str) -> torch.Tensor:
    """Spread per-pair values [..., R/2] over the last axis as the family expects its cos and sin."""
    if cos_layout == "halves":
        return torch.cat((values, values), dim=-1)  # [..., R]
    if cos_layout == "neighbours":
        return values.repeat_interleave(2, dim=-1)  # [..., R]
    return values  # [..., R/2]


class HandedOutRotary(torch.nn.Module):
    """Stands in for a model's rotary embedding and hands out the cos and sin that it was given."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos, self.sin


@contextlib.contextmanager
def replaced_module(model: torch.nn.Module, name: str, replacement: torch.nn.Module) -> Iterator[None]:
    """Put `replacement` at `name` and take it away again."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = getattr(parent, attribute)
    setattr(parent, attribute, replacement)
    try:
        yield
    finally:
        setattr(parent, attribute, original)


def rotate(x: torch.Tensor, angles: torch.Tensor, spec: RotarySpec) -> torch.Tensor:
    """Rotate the pairs of the first R dimensions of x [..., D] by angles [..., R/2] (RoFormer, arXiv:2104.09864)."""
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    cos, sin = angles.cos(), angles.sin()
    if spec.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def _probe_cos_layout(rotary: torch.nn.Module, inv_freq: torch.Tensor, scaling: float) -> str:
    positions = torch.tensor([[0, 1, 5]])
    hidden = torch.zeros(1, 3, 1, dtype=torch.float32)
    with torch.no_grad():
        cos, sin = rotary(hidden, position_ids=positions)
    angles = positions[..., None].double() * inv_freq  # [1, 3, R/2]
    for cos_layout in COS_LAYOUTS:
        want_cos, want_sin = (lay_out(v * scaling, cos_layout) for v in (angles.cos(), angles.sin()))
        if cos.shape == want_cos.shape and torch.allclose(cos.double(), want_cos, atol=1e-4) and torch.allclose(
            sin.double(), want_sin, atol=1e-4
        ):
            return cos_layout
    raise _refused(f"cos/sin of shape {tuple(cos.shape)} that are not those of its inv_freq", "plain rotary cos/sin")


def _with_and_without(
    model: torch.nn.Module, name: str, cos_layout: str, angles: torch.Tensor, num_layers: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per layer query [2, Hq, 1, D] and key [2, Hkv, 1, D] of attention: row 0 not rotated, row 1 by `angles`.

    The attention function returns zeros, so both rows have the same hidden states in every layer.
    """
    dtype = next(model.parameters()).dtype
    both = torch.stack((torch.zeros_like(angles), angles))[:, None, :]  # [2, 1, R/2]
    handed = HandedOutRotary(lay_out(both.cos(), cos_layout).to(dtype), lay_out(both.sin(), cos_layout).to(dtype))
    queries: dict[int, torch.Tensor] = {}
    keys: dict[int, torch.Tensor] = {}

    def record(module: Any, q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        queries[int(module.layer_idx)], keys[int(module.layer_idx)] = q.double(), k.double()
        return torch.zeros_like(q).transpose(1, 2), None  # [2, 1, Hq, D]

    ids = torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad(), intercept_attention(model, record), replaced_module(model, name, handed):
        model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
    if sorted(queries) != list(range(num_layers)):
        missing = sorted(set(range(num_layers)) - set(queries))
        raise _refused(f"layers {missing} without softmax attention", "attention in every layer")
    return [queries[layer] for layer in range(num_layers)], [keys[layer] for layer in range(num_layers)]


def _common_shape(queries: list[torch.Tensor], keys: list[torch.Tensor]) -> AttentionShape:
    shapes = {(q.shape[1], k.shape[1], q.shape[3]) for q, k in zip(queries, keys, strict=True)}
    if len(shapes) != 1:
        raise UsageError(
            problem(
                "attention",
                received=f"layers of different (query heads, key heads, head size): {sorted(shapes)}",
                expected="the same in all layers",
                fix="this model cannot be exported exactly",
            )
        )
    return AttentionShape(len(queries), *shapes.pop())


def _match_layout(layer: int, queries: torch.Tensor, angles: torch.Tensor) -> RotarySpec:
    plain, rotated = queries[0], queries[1]  # [Hq, 1, D] each
    tolerance = 2e-2 * float(plain.abs().max()) + 1e-6  # float16 rounds cos, sin and the products
    if torch.allclose(plain, rotated, rtol=0, atol=1e-9):
        return RotarySpec(rotary_dim=0, interleaved=False)
    for interleaved in (False, True):
        spec = RotarySpec(2 * angles.numel(), interleaved)
        if spec.rotary_dim <= plain.shape[-1] and torch.allclose(
            rotate(plain, angles, spec), rotated, rtol=0, atol=tolerance
        ):
            return spec
    raise _refused(f"a rotation in layer {layer} that is neither of halves nor of neighbours", "a known pairing")


def _refused(received: str, expected: str) -> UsageError:
    return UsageError(
        problem("rotary positions", received=received, expected=expected, fix="this model cannot be exported exactly")
    )
