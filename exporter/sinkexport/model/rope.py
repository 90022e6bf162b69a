"""How a model attends and rotates: read off the model itself, never assumed.

A family's rotary code differs in which numbers form a pair (halves or neighbours), how many dimensions turn, how cos
and sin are laid out and which layers share them. Instead of a table of families, `probe_attention` runs the model
once on two copies of a token: one copy sees no rotation (cos = 1, sin = 0), the other a known one. What the attention
function receives tells shapes and layout, and a layout that is not recognised is refused, so a guess can never reach a
bundle.
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
from sinkexport.model.interface import intercept_attention
from sinkexport.model.recurrent import RecurrentShapes, linear_layers, recurrent_cache, recurrent_shapes


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Facts of one model's attention, the same in all layers but for the window.

    own_windows: by layer, the tokens that the model itself sees in it, the newest included; None: all.
    alibi_slopes: [Hq], what a logit loses for each token of distance (ALiBi, arXiv:2108.12409); None: no ALiBi.
    recurrent: the layers that have linear attention, of which nothing else here is said.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    own_windows: tuple[int | None, ...]
    alibi_slopes: tuple[float, ...] | None = None
    recurrent: RecurrentShapes = dataclasses.field(default_factory=dict)


COS_LAYOUTS = ("halves", "neighbours", "single")
"""How a family lays out cos and sin over the last axis: (f, f), each of f twice in a row, or f alone."""


@dataclasses.dataclass(frozen=True)
class RotarySpec:
    """The rotation that one layer applies.

    rotary_dim: R, leading dimensions of a head that turn (0: the layer has no positions).
    interleaved: pairs are neighbours (2i, 2i+1); otherwise (i, i + R/2).
    table: of `ModelRotary.tables`, the name of that which the layer turns by.
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
    cos_layout: one of ``COS_LAYOUTS``. layers: one spec a layer, by layer index.
    """

    tables: Mapping[str, RotaryTable]
    cos_layout: str
    layers: tuple[RotarySpec, ...]


def find_rotary(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The one rotary embedding module of a model, or of its adapter: (name, module). None: it has ALiBi instead.

    Raises: UsageError if the model has none or several otherwise.
    """
    found = [(name, m) for name, m in model.named_modules() if name.endswith("rotary_emb") and _table_names(m)]
    if not found and has_alibi(model):
        return None
    adapter = find_adapter(model)
    if not found and adapter is not None and adapter.rotary is not None:
        return ROTARY_NAME, adapter.rotary(model)
    if len(found) != 1:
        raise _refused(f"{len(found)} rotary embeddings", "exactly one that all layers share")
    return found[0]


def probe_attention(
    model: torch.nn.Module, num_layers: int, capacity: int = 1
) -> tuple[AttentionShape, ModelRotary]:
    """Find out the shapes of a model's attention and how it rotates queries and keys.

    capacity: tokens that the cache will hold. Where the model makes its frequencies depend on the length of a text
    (longrope, arXiv:2402.13753; dynamic NTK), they are those of a text of this length.

    Raises: UsageError if layers differ in shape or have no attention, or if cos/sin or the rotation have a layout
    that is not known.
    """
    found = find_rotary(model)
    tables: dict[str, RotaryTable] = {}
    cos_layout = COS_LAYOUTS[0]
    if found is not None:
        _, rotary = found
        layouts = set()
        for table in _table_names(rotary):
            tables[table], layout = _probe_table(rotary, table, capacity)
            layouts.add(layout)
        if len(layouts) != 1:
            raise _refused(f"cos and sin laid out in {len(layouts)} ways", "one")
        cos_layout = layouts.pop()
    # Angles of each table differ, so that a layer's rotation tells which one it is of.
    angles = {
        key: torch.linspace(0.3 + 0.2 * i, 2.7 + 0.2 * i, table.frequency.numel(), dtype=torch.float64)
        for i, (key, table) in enumerate(tables.items())
    }
    cache = recurrent_cache(model)
    seen = _with_and_without(model, cos_layout, angles, num_layers, cache)
    still = RotarySpec(rotary_dim=0, interleaved=False)
    layers = tuple(still if one is None else _match_layout(layer, one.q, angles) for layer, one in enumerate(seen))
    return _common_shape(seen, recurrent_shapes(model, cache)), ModelRotary(tables, cos_layout, layers)


def _table_names(rotary: torch.nn.Module) -> list[str]:
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


def _probe_table(original: torch.nn.Module, table: str, capacity: int) -> tuple[RotaryTable, str]:
    """One set of frequencies and the layout of its cos and sin."""
    rotary = copy.deepcopy(original)  # it changes its frequencies by the positions that it is asked for
    prefix, layer_type = (f"{table}_", {"layer_type": table}) if table else ("", {})
    near = torch.tensor([[0, 1, 5]])
    # The last position says how long the text is; float32 is too coarse there to compare.
    positions = torch.cat((near, torch.tensor([[max(5, capacity - 1)]])), dim=1)
    with torch.no_grad():
        rotary(torch.zeros(1, 1, 1), near[:, :1], **layer_type)  # forget a longer text that came before
        cos, sin = rotary(torch.zeros(1, 4, 1), positions, **layer_type)
    cos, sin = cos[..., :3, :].double(), sin[..., :3, :].double()
    inv_freq = rotary.get_buffer(f"{prefix}inv_freq").double()  # [R/2], radians a token
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    angles = near[..., None].double() * inv_freq  # [1, 3, R/2]
    for cos_layout in COS_LAYOUTS:
        want_cos, want_sin = (lay_out(v * scaling, cos_layout) for v in (angles.cos(), angles.sin()))
        if cos.shape == want_cos.shape and torch.allclose(cos, want_cos, atol=1e-4) and torch.allclose(
            sin, want_sin, atol=1e-4
        ):
            frequency = torch.tensor([phase_frequency(float(f)) for f in inv_freq], dtype=torch.int64)
            return RotaryTable(frequency, scaling), cos_layout
    raise _refused(f"cos/sin of shape {tuple(cos.shape)} that are not those of its inv_freq", "plain rotary cos/sin")


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the attention function of one layer was given: q [2, Hq, 1, D] and k [2, Hkv, 1, D]."""

    q: torch.Tensor
    k: torch.Tensor
    own_window: int | None
    alibi_slopes: tuple[float, ...] | None


def _with_and_without(
    model: torch.nn.Module, cos_layout: str, angles: Mapping[str, torch.Tensor], num_layers: int, cache: Any | None
) -> list[_Seen | None]:
    """What attention is given in each layer, row 0 not rotated, row 1 by `angles`; None: linear attention.

    The attention function returns zeros, so both rows have the same hidden states in every layer.
    """
    dtype = next(model.parameters()).dtype
    both = {table: torch.stack((torch.zeros_like(a), a))[:, None, :] for table, a in angles.items()}  # [2, 1, R/2]
    handed = HandedOutRotary({
        table: (lay_out(a.cos(), cos_layout).to(dtype), lay_out(a.sin(), cos_layout).to(dtype))
        for table, a in both.items()
    })  # fmt: skip
    seen: dict[int, _Seen] = {}

    def record(
        module: Any, q: torch.Tensor, k: torch.Tensor, *_: Any, sliding_window: int | None = None,
        alibi_slopes: torch.Tensor | None = None, **__: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        slopes = None if alibi_slopes is None else tuple(alibi_slopes.tolist())
        seen[int(module.layer_idx)] = _Seen(q.double(), k.double(), sliding_window, slopes)
        return torch.zeros_like(q).transpose(1, 2), None  # [2, 1, Hq, D]

    ids = torch.ones(2, 1, dtype=torch.int64)
    with torch.no_grad(), intercept_attention(model, record), replaced_rotary(model, handed):
        model(input_ids=ids, position_ids=torch.zeros_like(ids), past_key_values=cache, use_cache=False)
    if missing := sorted(set(range(num_layers)) - set(seen) - linear_layers(model)):
        raise _refused(f"layers {missing} without softmax attention", "softmax or linear attention in every layer")
    return [seen.get(layer) for layer in range(num_layers)]


def _common_shape(seen: list[_Seen | None], recurrent: RecurrentShapes) -> AttentionShape:
    softmax = [one for one in seen if one is not None]
    shapes = {(one.q.shape[1], one.k.shape[1], one.q.shape[3], one.alibi_slopes) for one in softmax}
    if len(shapes) != 1:
        raise UsageError(
            problem(
                "attention",
                received=f"layers of different (query heads, key heads, head size, ALiBi slopes): {sorted(shapes)}",
                expected="the same in all layers",
                fix="this model cannot be exported exactly",
            )
        )
    num_q_heads, num_kv_heads, head_dim, slopes = shapes.pop()
    windows = tuple(None if one is None else one.own_window for one in seen)
    return AttentionShape(len(seen), num_q_heads, num_kv_heads, head_dim, windows, slopes, recurrent)


def _match_layout(layer: int, queries: torch.Tensor, angles: Mapping[str, torch.Tensor]) -> RotarySpec:
    plain, rotated = queries[0], queries[1]  # [Hq, 1, D] each
    tolerance = 2e-2 * float(plain.abs().max()) + 1e-6  # float16 rounds cos, sin and the products
    if torch.allclose(plain, rotated, rtol=0, atol=1e-9):
        return RotarySpec(rotary_dim=0, interleaved=False)
    for table, turn in angles.items():
        for interleaved in (False, True):
            spec = RotarySpec(2 * turn.numel(), interleaved, table)
            if spec.rotary_dim <= plain.shape[-1] and torch.allclose(
                rotate(plain, turn, spec), rotated, rtol=0, atol=tolerance
            ):
                return spec
    raise _refused(f"a rotation in layer {layer} that is neither of halves nor of neighbours", "a known pairing")


def _refused(received: str, expected: str) -> UsageError:
    return UsageError(
        problem("rotary positions", received=received, expected=expected, fix="this model cannot be exported exactly")
    )
