"""One attention call in float64, slow and obvious, and what the mask that it was given lets tokens see."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.families.interface import refuse_arguments


class View(NamedTuple):
    """Tokens that a head keeps: the first num_sinks, and the last `window` of the others."""

    num_sinks: int
    window: int


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """What an attention call was given beside queries, keys, values and a mask.

    softcap: 0 for none. sink_logits: [Hq], learned logits without a value. alibi_slopes: [Hq].
    sliding_window: tokens that the model itself sees; None: all.
    """

    layer: int
    scaling: float
    softcap: float
    sink_logits: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sliding_window: int | None

    def of_heads(self, q_heads: list[int]) -> CallArguments:
        """The same of some query heads."""
        sink_logits, alibi_slopes = (None if x is None else x[q_heads] for x in (self.sink_logits, self.alibi_slopes))
        return dataclasses.replace(self, sink_logits=sink_logits, alibi_slopes=alibi_slopes)


def call_arguments(layer: int, q: torch.Tensor, arguments: dict[str, Any]) -> CallArguments:
    """Read the keywords of transformers' attention interface.

    Raises: UsageError for one that is not known.
    """
    known = ("scaling", "softcap", "s_aux", "alibi_slopes", "sliding_window")
    refuse_arguments(layer, {name: value for name, value in arguments.items() if name not in known})
    scaling, softcap, sink_logits, alibi_slopes, sliding_window = (arguments.get(name) for name in known)
    return CallArguments(
        layer=layer,
        scaling=q.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=float(softcap or 0.0),
        sink_logits=None if sink_logits is None else sink_logits.detach().double().flatten(),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.double().flatten(),
        sliding_window=sliding_window,
    )


def attended(
    given: CallArguments,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    behind: torch.Tensor,
    seen: torch.Tensor,
    first_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of q [B, Hq, T, D] over k and v [B, Hkv, n, .] in float64: [B, T, Hq, Dv].

    behind: int64 [T, n], distance from each key to each query, in the cache. seen: bool [T, n].
    first_token: [Hq], added to the logits of the first key. (RoPE needs no distance: keys and queries are rotated.)
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, dim=1) for x in (k, v))
    logits = q @ k.mT * given.scaling  # [B, Hq, T, n]
    if given.softcap:
        logits = given.softcap * torch.tanh(logits / given.softcap)
    if given.alibi_slopes is not None:
        logits = logits - given.alibi_slopes[:, None, None] * behind
    if first_token is not None:
        logits[..., 0] += first_token[:, None]
    logits = logits.masked_fill(~seen, float("-inf"))
    if given.sink_logits is not None:
        extra = given.sink_logits[:, None, None].expand(*logits.shape[:-1], 1)
        weights = torch.cat((logits, extra), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def causal_masks(*, batch_size: int, **arguments: Any) -> torch.Tensor:
    """transformers' mask interface: additive, [B, 1, n, n], the same for all rows of texts without padding."""
    from transformers.masking_utils import eager_mask

    arguments.update(attention_mask=None, allow_is_causal_skip=False)
    mask: torch.Tensor = eager_mask(batch_size=1, **arguments)
    return mask.expand(batch_size, -1, -1, -1)


def with_indices(module: Any, q: torch.Tensor, mask: Any, arguments: dict[str, Any]) -> Any:
    """The mask of an attention call, and what an indexer of sparse attention chose of it, which leaves `arguments`.

    ``indices``: int64 [b, n, k], keys of each query. ``block_indices``: blocks of keys, which the model's own indexer
    makes a mask of. transformers merges them into the mask for its own attention functions alone.
    """
    indices, blocks = (arguments.pop(name, None) for name in ("indices", "block_indices"))
    num_tokens = q.shape[2]
    if indices is not None:
        chosen = torch.zeros(q.shape[0], num_tokens, num_tokens, dtype=torch.bool)
        chosen = chosen.scatter(-1, indices.long(), value=True)[:, None]
        mask = chosen if mask is None else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
    if blocks is not None:
        places = torch.arange(num_tokens).expand(q.shape[0], -1)
        mask = module.indexer.build_block_mask(blocks, mask, num_tokens, q.dtype, q.device, places)
    return mask


def visible_window(layer: int, mask: Any, num_tokens: int) -> int | None:
    """Number of the newest tokens that each of num_tokens tokens sees by its mask [.., n, n]; None: all before it.

    Raises: UsageError if a mask shows others, or is more than a mask.
    """
    seen = _visible(layer, mask)
    behind = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    count = int(seen[0, 0, -1].sum()) if seen.shape[-2:] == behind.shape else 0
    if not bool((seen == (behind >= 0) & (behind < count)).all()):
        raise _refused(f"a mask in layer {layer} that is no window of the newest tokens")
    return None if count == num_tokens else count


def check_visible(layer: int, mask: Any, row: int, newest: int, cached: list[int]) -> None:
    """Make sure that a row's newest token may see all cached ones.

    Raises: UsageError.
    """
    if isinstance(mask, torch.Tensor) and not bool(_visible(layer, mask[row : row + 1, :, newest, cached]).all()):
        raise _refused(f"a mask in layer {layer} that hides a cached token")


def _visible(layer: int, mask: Any) -> torch.Tensor:
    """True where a mask, bool or additive, shows a token."""
    if not isinstance(mask, torch.Tensor) or mask.dim() < 3:
        raise _refused(f"a mask of its own in layer {layer}")
    if mask.dtype == torch.bool:
        return mask
    visible = mask > torch.finfo(mask.dtype).min / 2
    if bool(mask[visible].any()):
        raise _refused(f"a bias in the mask of layer {layer}")
    return visible


def _refused(received: str) -> UsageError:
    return UsageError(
        problem(
            "attention",
            received=received,
            expected="all tokens before, or a window of the newest",
            fix="there is no streaming reference for this model",
        )
    )
