"""Sizes of a model's attention, call by call.

A layer of most families attends once. Some attend twice (DiffLlama, arXiv:2410.05258), some not at all, some run
through their layers again, and sizes may differ from layer to layer. So what counts is a call of the attention
function: call n is the n-th in every forward pass.
"""

from __future__ import annotations

import dataclasses

from sinkrt.contract import AttentionCache, attention_entries

from sinkexport.families.latent import Latent
from sinkexport.recurrent.states import RecurrentShapes


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function in a forward pass.

    layer: index of its layer. number: of the calls of that layer, from 0 on.
    num_kv_heads: the larger number, where there are fewer key than value heads or the other way round (DHA,
    arXiv:2406.06567): the fewer are repeated.
    key_dim, value_dim: elements of a key or query, and of a value.
    sliding_window: tokens that the model itself sees, the newest included; None: all.
    alibi_slopes: [Hq], what a logit loses for each token of distance (ALiBi, arXiv:2108.12409); None: no ALiBi.
    is_tiled: whether query head i reads key head i modulo Hkv (JetMoE, where experts make queries for the same keys);
    otherwise those of a key head lie in a row.
    shares: index of an earlier call whose keys and values this one reads; None: it has its own.
    latent: how they are expanded from a latent, where what turns leads in queries and keys; None: they are not.
    """

    layer: int
    number: int
    num_q_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    alibi_slopes: tuple[float, ...] | None = None
    is_tiled: bool = False
    shares: int | None = None
    latent: Latent | None = None

    @property
    def entry(self) -> AttentionCache:
        """How a manifest describes what it attends to, with keys and values expanded."""
        heads = (self.num_q_heads, self.num_kv_heads, self.key_dim, self.value_dim)
        return AttentionCache(self.layer, self.number, *heads, latent=False)

    def query_heads(self, key_head: int) -> tuple[int, ...]:
        """Indices of the query heads that read a key head."""
        if self.is_tiled:
            return tuple(range(key_head, self.num_q_heads, self.num_kv_heads))
        size = self.num_q_heads // self.num_kv_heads
        return tuple(range(key_head * size, (key_head + 1) * size))


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """All that a model carries from token to token.

    calls: of one forward pass, in their order. recurrent: states of fixed size, of layers that have some.
    """

    num_layers: int
    calls: tuple[AttentionCall, ...]
    recurrent: RecurrentShapes = dataclasses.field(default_factory=dict)

    @property
    def is_uniform(self) -> bool:
        """Whether no layer attends twice, and all that do have the same sizes, as a manifest without `attention`."""
        is_latent = any(call.latent is not None for call in self.calls)
        return not is_latent and attention_entries(self, [call.entry for call in self.calls]) is None

    @property
    def num_q_heads(self) -> int:
        """Hq of the first call; 0: there is none."""
        return self.calls[0].num_q_heads if self.calls else 0

    @property
    def num_kv_heads(self) -> int:
        """Hkv of the first call; 0: there is none."""
        return self.calls[0].num_kv_heads if self.calls else 0

    @property
    def head_dim(self) -> int:
        """Elements of a key of the first call; 0: there is none."""
        return self.calls[0].key_dim if self.calls else 0

    @property
    def alibi_slopes(self) -> tuple[float, ...] | None:
        """[Hq], of all calls alike; None: no ALiBi."""
        return self.calls[0].alibi_slopes if self.calls else None
