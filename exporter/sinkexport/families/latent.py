"""Latent attention (MLA, DeepSeek-V2, arXiv:2405.04434): keys and values that one matrix expands from a small latent.

For each token such a layer makes a latent, L numbers for all heads, and a rotary key, R numbers that all heads share.
Key and value of head h are ``[W_k,h latent, rotary key]`` and ``W_v,h latent``. So a cache need not hold them: with
``q_row = [q_rotary, q_rest W_k,h]`` and ``row = [rotary key, latent]`` every logit q . k is q_row . row, and the output
of head h is W_v,h times the latent part of the weighted sum of rows. That is attention with one key head, whose rows
are keys and values at once: R + L numbers a token, for DeepSeek-V3 576 in place of 128 * (192 + 128).

transformers hands latent and rotary key to its cache before it expands them. So a layer is recognised by what it does:
what it caches is not what reaches its attention, and a matrix of its own makes the one of the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sinkexport.families.interface import intercept_attention, layer_of, own_values, random_embeddings
from sinkexport.families.recurrent import with_cache
from sinkexport.families.rope import Replacements, replaced_rotary

KEYS, VALUES = "latent_keys", "latent_values"
"""Names of the parts of a matrix in a graph, beside it."""

Pair = tuple[torch.Tensor, torch.Tensor]
Matmul = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""x [H, n, K] by a matrix for each head, [H, K, M] if the flag says so, else [H, M, K] -> [H, n, M]."""


@dataclasses.dataclass(frozen=True)
class Latent:
    """How one attention call expands keys and values.

    weight: name of the matrix [H * (N + V), L], a parameter of the model: for each head the rows of its key, then those
    of its value. num_heads, rest_dim, value_dim, latent_dim, rotary_dim: H, N, V, L, R.
    rotary_first: whether keys begin with the rotary key. latent_first: whether the latent is cached as the key, and the
    rotary key as the value, or the other way round.
    """

    weight: str
    num_heads: int
    rest_dim: int
    value_dim: int
    latent_dim: int
    rotary_dim: int
    rotary_first: bool = False
    latent_first: bool = True

    @property
    def row_dim(self) -> int:
        """Numbers of a cached row: R + L."""
        return self.rotary_dim + self.latent_dim

    @property
    def owner(self) -> str:
        """Name of the module whose parameter the matrix is."""
        return self.weight.rpartition(".")[0]

    @property
    def is_worth_it(self) -> bool:
        """Whether there are rows of both parts, and a row has fewer numbers than keys and values of all heads."""
        expanded = self.num_heads * (self.rest_dim + self.rotary_dim + self.value_dim)
        return self.rotary_dim > 0 and self.row_dim < expanded

    def parts(self, weight: torch.Tensor) -> Pair:
        """W_k [H, N, L] and W_v [H, V, L], which share the memory of the matrix."""
        by_head = weight.view(self.num_heads, self.rest_dim + self.value_dim, self.latent_dim)
        return by_head[:, : self.rest_dim], by_head[:, self.rest_dim :]

    def row(self, cached: Pair) -> torch.Tensor:
        """The row [B, 1, T, R + L] of what a layer caches, [B, 1, T, L] and [B, 1, T, R]."""
        latent, rotary = cached if self.latent_first else cached[::-1]
        return torch.cat((rotary, latent), dim=-1)

    def expanded(self, cached: Pair, weight: torch.Tensor) -> Pair:
        """Keys [B, H, T, R + N] and values [B, H, T, V], as the layer makes them, but for what turns: it leads."""
        latent, rotary = cached if self.latent_first else cached[::-1]
        batch, _, num_tokens, _ = latent.shape
        made = torch.nn.functional.linear(latent[:, 0], weight).view(batch, num_tokens, self.num_heads, -1)
        rest, values = made.transpose(1, 2).split((self.rest_dim, self.value_dim), dim=-1)
        return torch.cat((rotary.expand(-1, self.num_heads, -1, -1), rest), dim=-1), values

    def rotary_part_first(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [.., N + R] as [.., R + N]: what turns leads, as everywhere else."""
        return x if self.rotary_first else torch.cat((x[..., self.rest_dim :], x[..., : self.rest_dim]), dim=-1)

    def query(self, q: torch.Tensor, keys: torch.Tensor, matmul: Matmul) -> torch.Tensor:
        """The query [B, H, T, R + L] of rows, for q [B, H, T, N + R] of keys. keys: W_k."""
        rotary, rest = self.rotary_part_first(q).split((self.rotary_dim, self.rest_dim), dim=-1)
        return torch.cat((rotary, _by_head(rest, keys, matmul, is_transposed=True)), dim=-1)

    def output(self, latents: torch.Tensor, values: torch.Tensor, matmul: Matmul) -> torch.Tensor:
        """The output [B, H, T, V] of sums of latents [B, H, T, L]. values: W_v."""
        return _by_head(latents, values, matmul, is_transposed=False)


def _by_head(x: torch.Tensor, weight: torch.Tensor, matmul: Matmul, *, is_transposed: bool) -> torch.Tensor:
    """x [B, H, T, K] of each head by its own matrix -> [B, H, T, M]. All streams share one pass over the matrices."""
    batch, heads, num_tokens, _ = x.shape
    rows = x.transpose(0, 1).reshape(heads, batch * num_tokens, -1)
    return matmul(rows, weight, is_transposed).reshape(heads, batch, num_tokens, -1).transpose(0, 1)


class CachedPairs:
    """Stands in for transformers' cache: it hands back what it is given, and keeps it until attention is called.

    instead_of: a cache of recurrent states whose ``update`` it takes over; None: there are none.
    """

    is_compileable = False

    def __init__(self, instead_of: Any | None = None) -> None:
        self._pairs: dict[int, Pair] = {}
        if instead_of is not None:
            instead_of.update = self.update
        self.cache = self if instead_of is None else instead_of
        """What the model is given."""

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Pair:
        """Remember k and v."""
        self._pairs[layer_idx] = (k, v)
        return k, v

    def take(self, layer: int) -> Pair | None:
        """What a layer has cached since its last attention; None: nothing."""
        return self._pairs.pop(layer, None)

    def get_seq_length(self, *_: Any) -> int:
        """Positions are given."""
        return 0

    def get_query_offset(self, *_: Any) -> int:
        """Likewise."""
        return 0

    def get_mask_sizes(self, num_tokens: int, *_: Any) -> tuple[int, int]:
        """Keys are those of the tokens at hand."""
        return num_tokens, 0


def find_latents(model: Any, still: Replacements, num_tokens: int, recurrent_cache: Any | None) -> list[Latent | None]:
    """The latent attention of each call of a forward pass; empty: there is none.

    still: rotary embeddings that turn nothing. recurrent_cache: an empty one, if the model needs one.
    """
    pairs, found = CachedPairs(recurrent_cache), list[Latent | None]()
    names = {module: name for name, module in model.named_modules()}

    def record(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        latent = find_latent(module, pairs.take(layer_of(module)), q, k, v)
        if latent is not None:
            latent = dataclasses.replace(latent, weight=f"{names[module]}.{latent.weight}")
        found.append(latent)
        return own_values(q, v), None

    ids = torch.arange(num_tokens)[None]
    # A model that does not take such a cache has its keys and values cached as they are.
    with (
        contextlib.suppress(Exception),
        torch.no_grad(),
        random_embeddings(model, num_tokens),
        intercept_attention(model, record),
        replaced_rotary(model, still),
    ):
        model(input_ids=ids, position_ids=ids, use_cache=False, **with_cache(model, pairs.cache))
        return found if any(found) else []
    return []


def find_latent(
    module: torch.nn.Module, cached: Pair | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Latent | None:
    """Recognise latent attention by one call of it; None: keys and values are to be cached as they are.

    cached: what the layer put into its cache for the same tokens. q, k [B, H, T, N + R] and v [B, H, T, V] are what
    reached attention. Every number of k and v must follow from the pair: on random tokens no other matrix would do. The
    name of the matrix is that in the module.
    """
    if cached is None or not k.shape[1] == v.shape[1] == q.shape[1]:
        return None
    if any(x.dim() != 4 or x.shape[1] != 1 or x.shape[2] != k.shape[2] for x in cached):
        return None
    return next(_candidates(module, cached, k, v), None)


def _candidates(module: torch.nn.Module, cached: Pair, k: torch.Tensor, v: torch.Tensor) -> Iterator[Latent]:
    """All ways in which a matrix of the module makes k and v of what is cached."""
    num_heads, key_dim, value_dim = k.shape[1], k.shape[3], v.shape[3]
    for latent_first, rotary_first in ((True, False), (True, True), (False, False), (False, True)):
        latent, rotary = cached if latent_first else cached[::-1]
        rotary_dim = rotary.shape[3]
        rest_dim = key_dim - rotary_dim
        if rest_dim < 1:
            continue
        sizes = (rotary_dim, rest_dim) if rotary_first else (rest_dim, rotary_dim)
        parts = k.split(sizes, dim=-1)
        shared, rest = parts if rotary_first else parts[::-1]
        if not torch.equal(shared, rotary.expand_as(shared)):
            continue
        made = torch.cat((rest, v), dim=-1)
        for name, weight in module.named_parameters():
            is_linear = name.rpartition(".")[2] == "weight"
            fits = is_linear and weight.shape == (num_heads * made.shape[3], latent.shape[3])
            if fits and _makes(weight, latent, made):
                yield Latent(
                    weight=name,
                    num_heads=num_heads,
                    rest_dim=rest_dim,
                    value_dim=value_dim,
                    latent_dim=latent.shape[3],
                    rotary_dim=rotary_dim,
                    rotary_first=rotary_first,
                    latent_first=latent_first,
                )


def _makes(weight: torch.Tensor, latent: torch.Tensor, made: torch.Tensor) -> bool:
    """Whether the matrix [H * M, L] makes [B, H, T, M] of the latent [B, 1, T, L]: each number but for rounding."""
    batch, num_heads, num_tokens, width = made.shape
    wanted = (latent[:, 0].double() @ weight.double().T).view(batch, num_tokens, num_heads, width).transpose(1, 2)
    # A sum of L products is wrong by a share of what their sizes add up to, whatever is left of it.
    sizes = (latent[:, 0].double().abs() @ weight.double().abs().T).view(batch, num_tokens, num_heads, width)
    share = max(1e-6, 4 * torch.finfo(weight.dtype).eps)
    return bool(((made.double() - wanted).abs() <= share * sizes.transpose(1, 2)).all())
