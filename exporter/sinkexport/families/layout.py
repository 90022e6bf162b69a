"""Which dimensions of queries and keys turn, in which pairs and by which frequencies: read off what attention is given.

A call's queries and keys are known twice, once unrotated and once turned by known angles. Pairs of halves and of
neighbours in the leading dimensions are tried first. Any other pairing, or a rotation the other way, is searched for: a
dimension i that turns is ``cos x_i - sin x_j`` for one other dimension j, and then j is ``cos x_j + sin x_i``. All of
them are pairs of halves in some order of the dimensions, and logits do not change if queries and keys are reordered
alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from sinkexport.families.rope import RotarySpec, RotaryTable, refused_rotary, rotate

STILL = RotarySpec(rotary_dim=0, interleaved=False)
"""The spec of a call without positions."""

MAX_VECTORS = 64
"""Vectors of all heads and tokens by which a pairing is searched for; it is checked by all."""

Angles = Mapping[str, torch.Tensor]
"""Angles [T, R/2] that tokens were turned by, by table."""


class Given(Protocol):
    """What one call of attention was given: q [Hq, T, Dk], k [Hkv, T, Dk] and v [Hkv, T, Dv], float64."""

    @property
    def layer(self) -> int:
        """Index of its layer."""

    @property
    def q(self) -> torch.Tensor:
        """Queries."""

    @property
    def k(self) -> torch.Tensor:
        """Keys."""

    @property
    def v(self) -> torch.Tensor:
        """Values."""


class NoLayoutError(Exception):
    """A call whose queries and keys are no rotation of their unrotated selves. differ: in which way."""

    def __init__(self, differ: str, layer: int) -> None:
        super().__init__(differ)
        self.refusal = refused_rotary(
            f"{differ} in layer {layer}",
            "a rotation of queries and keys, with nothing after it but a norm and its weight",
        )


def find_layout(
    before: Given, after: Given, tables: Mapping[str, RotaryTable], angles: Angles, dtype: torch.dtype
) -> RotarySpec:
    """The rotation that a call's queries and keys have, which must be the same for both.

    before, after: unrotated, and turned by these angles, cos and sin times each table's scaling. dtype: the model's.

    Raises: NoLayoutError if there is none. UsageError if values turn, or if the numbers are too small to show it.
    """
    candidates = list(_candidates(tables, angles, before.q.shape[-1]))
    fits_q, fits_k = (
        {spec for spec in candidates if _is_turned(x, y, tables, angles, spec, dtype)}
        for x, y in ((before.q, after.q), (before.k, after.k))
    )
    found = fits_q & fits_k
    if not found:
        found = set(_searched(before, after, tables, angles, dtype))
    if len(found) > 1:
        raise refused_rotary(
            f"queries and keys in layer {before.layer} that are too small to show how they turn",
            "numbers in the range of their type",
        )
    if not found:
        raise NoLayoutError(
            "queries and keys that are turned in different ways"
            if fits_q and fits_k
            else f"{'keys' if fits_q else 'queries'} that are more than a rotation of their unrotated selves",
            before.layer,
        )
    if not is_close(after.v, before.v, dtype):
        raise refused_rotary(f"values that turn in layer {before.layer}", "queries and keys alone")
    spec = found.pop()
    same = (name for name, table in tables.items() if spec.rotary_dim and table.is_same(tables[spec.table]))
    return dataclasses.replace(spec, table=next(same, spec.table))


def _candidates(tables: Mapping[str, RotaryTable], angles: Angles, head_dim: int) -> Iterator[RotarySpec]:
    """No rotation, and pairs of halves and of neighbours in the leading dimensions by each table."""
    yield STILL
    for table in tables:
        for interleaved in (False, True):
            spec = RotarySpec(rotary_dim=2 * angles[table].shape[-1], interleaved=interleaved, table=table)
            # Of a single pair both are one: the first will do.
            if spec.rotary_dim <= head_dim and not (interleaved and spec.rotary_dim == 2):
                yield spec


def _searched(
    before: Given, after: Given, tables: Mapping[str, RotaryTable], angles: Angles, dtype: torch.dtype
) -> Iterator[RotarySpec]:
    """Rotations of other pairs, which fit queries and keys alike."""
    for name, table in tables.items():
        turn = angles[name]
        if 2 * turn.shape[-1] > before.q.shape[-1]:
            continue
        for x, y in ((before.q, after.q), (before.k, after.k)):  # either may have dimensions that hide their pair
            order = _find_order(x, y, turn, table.scaling)
            if order is None:
                continue
            spec = RotarySpec(rotary_dim=2 * turn.shape[-1], interleaved=False, table=name, order=order)
            pairs = ((before.q, after.q), (before.k, after.k))
            if all(_is_turned(*pair, tables, angles, spec, dtype) for pair in pairs):
                yield spec
                break


def _find_order(
    plain: torch.Tensor, turned: torch.Tensor, angles: torch.Tensor, scaling: float
) -> tuple[int, ...] | None:
    """The order of the dimensions of [H, T, D] in which halves turn by angles [T, P]; None: no pairing was found.

    The best of all (pair of angles, partner, direction) is taken for each dimension; both of a pair must agree.
    """
    heads = max(1, MAX_VECTORS // plain.shape[1])
    x, y = (t[:heads].flatten(0, 1).T for t in (plain, turned))  # [D, N]
    cos, sin = (f.T.repeat(1, min(heads, plain.shape[0])) * scaling for f in (angles.cos(), angles.sin()))  # [P, N]
    rest = y - cos[:, None] * x  # [P, D, N]: - sin x_j where i comes first in its pair, and + sin x_j where second
    other = sin[:, None] * x  # [P, D, N]
    dot = rest @ other.mT  # [P, D, D]: of dimension i by dimension j
    sizes = other.square().sum(-1)[:, None] + torch.finfo(torch.float64).tiny  # [P, 1, D]
    squares = rest.square().sum(-1)[..., None] + sizes
    error = torch.stack((squares + 2 * dot, squares - 2 * dot)) / sizes  # [2, P, D, D]: of first and of second
    num_pairs, dim = error.shape[1:3]
    best, places = error.permute(2, 0, 1, 3).flatten(1).min(dim=-1)  # [D]
    firsts, seconds = dict[int, tuple[int, int]](), dict[int, tuple[int, int]]()  # by pair: dimension, partner
    is_still = (y - x).square().sum(-1) <= best * x.square().sum(-1)
    for i, place in enumerate(places.tolist()):
        if not bool(is_still[i]):
            is_second, pair, partner = place // (num_pairs * dim), place // dim % num_pairs, place % dim
            (seconds if is_second else firsts)[pair] = i, partner
    agree = all(pair in firsts and pair in seconds and firsts[pair] == seconds[pair][::-1] for pair in range(num_pairs))
    if not agree:
        return None
    turning = [firsts[pair][0] for pair in range(num_pairs)] + [seconds[pair][0] for pair in range(num_pairs)]
    return (*turning, *(i for i in range(dim) if i not in turning))


def _is_turned(
    plain: torch.Tensor,
    turned: torch.Tensor,
    tables: Mapping[str, RotaryTable],
    angles: Angles,
    spec: RotarySpec,
    dtype: torch.dtype,
) -> bool:
    """Whether turned [H, T, D] is plain by the angles of its table, each pair of each head on its own scale."""
    wanted = plain
    if spec.rotary_dim:
        turn, scaling = angles[spec.table], tables[spec.table].scaling
        wanted = rotate(plain, turn.cos() * scaling, turn.sin() * scaling, spec)
    error = (turned - wanted).abs().amax(dim=1)  # [H, D]
    size = plain.square().mean(dim=1)  # [H, D]
    if spec.order is not None:
        error, size = error[:, list(spec.order)], size[:, list(spec.order)]
    pairs = size[:, : spec.rotary_dim]
    if spec.interleaved:
        pairs = pairs.unflatten(-1, (-1, 2)).sum(dim=-1).repeat_interleave(2, dim=-1)
    elif spec.rotary_dim:
        pairs = sum(pairs.chunk(2, dim=-1)).repeat(1, 2)
    size = torch.cat((pairs, size[:, spec.rotary_dim :]), dim=-1).sqrt()
    return bool((error <= tolerance(dtype) * size + smallest(dtype)).all())


def tolerance(dtype: torch.dtype) -> float:
    """Error of a rotation as a share of its pair's size: cos, sin, multiplications and sums are rounded."""
    return max(1e-4, 16 * torch.finfo(dtype).eps)


def smallest(dtype: torch.dtype) -> float:
    """Magnitude at which numbers of a type lose digits: a few of its smallest steps."""
    return 4 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def is_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two runs' tensors [.., N] are equal but for rounding, each row on its own scale; NaN is not."""
    error, size = (got - wanted).abs().amax(dim=-1), wanted.abs().amax(dim=-1)
    return bool((error <= tolerance(dtype) * size + smallest(dtype)).all())
