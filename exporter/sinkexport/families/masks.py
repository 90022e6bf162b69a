"""Tokens that a layer's own mask lets a token see: all before it or a window of the newest; all else is refused.

transformers describes a mask as a function of (stream, head, query's place, key's place) before it makes a tensor of
it. The recorder takes that function, hands out a marked tensor in its place, and finds by the mark which layer was
given which mask. The function can then be asked about places far beyond the few tokens that the probe runs. What it
holds for each of those tokens, as which image they belong to, is lengthened as long as it says the same of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sinkrt.errors import UsageError, problem


class MaskRecorder:
    """transformers' mask interface, as of `intercept_attention`."""

    def __init__(self) -> None:
        self._functions: list[Callable[..., torch.Tensor]] = []

    def __call__(
        self, *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., torch.Tensor], **_: Any
    ) -> torch.Tensor:
        """A mask [B, 1, T, n] of the number of its function, from 1 on."""
        self._functions.append(mask_function)
        return torch.full((batch_size, 1, q_length, kv_length), float(len(self._functions)))

    def check(self, calls: Sequence[tuple[int, Any, int | None]], capacity: int, *, adapted: bool) -> None:
        """Compare what layers mask with the windows that they pass to their attention.

        calls: the layer of each call of attention, the mask that it was given and its window, None for all tokens.
        adapted: whether the family's attention is one of ours, which has no masks.

        Raises: UsageError if a layer masks anything but a window, or another one than it passes.
        """
        windows: dict[int, int | None] = {}
        for layer, mask, passed in () if adapted else calls:
            number = self._number(mask)
            if number is None:
                if mask is not None or self._functions:
                    raise _refused(f"{'a mask of its own' if mask is not None else 'no causal mask'} in layer {layer}")
                continue  # a family without transformers' masks: what it sees, the finished graph is compared by
            if number not in windows:
                lengthen_tables(self._functions[number - 1], 2 * capacity + 2)
                windows[number] = visible_window(self._functions[number - 1], capacity, layer)
            passed = None if passed is not None and passed > 2 * capacity else passed
            if windows[number] != passed:
                raise _refused(
                    f"a mask of {windows[number] or 'all'} tokens in layer {layer}, which passes a window "
                    f"of {passed or 'all'}"
                )

    def _number(self, mask: Any) -> int | None:
        """Number of the function that a mask is of; None: of none."""
        if not isinstance(mask, torch.Tensor) or not mask.numel():
            return None
        number = float(mask.flatten()[0])
        is_ours = bool((mask == number).all()) and number in range(1, len(self._functions) + 1)
        return int(number) if is_ours else None


def visible_window(function: Callable[..., torch.Tensor], capacity: int, layer: int) -> int | None:
    """Number of the newest tokens that a mask function lets a token see, itself included; None: all of 2 C.

    A mask of chunks, in which a token sees those of its own chunk, sees all while a chunk holds the whole cache: a
    token's chunk is that of its in-cache position.

    Raises: UsageError if it sees others.
    """
    counts = {}
    for place in sorted({0, 1, capacity - 1, capacity, 2 * capacity}):
        try:
            seen = _seen(function, place)
        except IndexError:  # of a table of the tokens that the probe ran
            raise _refused(f"a mask in layer {layer} that differs from token to token") from None
        counts[place] = int(seen.sum())
        keys = torch.arange(place + 2)
        if not torch.equal(seen, (keys <= place) & (keys > place - counts[place])):
            raise _refused(f"a mask in layer {layer} that is no window of the newest tokens")
    window = counts[2 * capacity]
    if all(count == min(place + 1, window) for place, count in counts.items()):
        return None if window == 2 * capacity + 1 else window
    chunk = _chunk_size(function, 2 * capacity)
    if chunk is None:
        raise _refused(f"a mask in layer {layer} whose window is not of one size")
    if chunk < capacity:
        raise UsageError(
            problem(
                "attention",
                received=f"{capacity} cached tokens, and chunks of {chunk} tokens in layer {layer}",
                expected=f"a cache that one chunk holds: at most {chunk} tokens, sinks included",
                fix=f"choose --sink-tokens and --window that add up to {chunk} or less",
            )
        )
    return None


def lengthen_tables(function: Callable[..., torch.Tensor], length: int) -> None:
    """Lengthen what a mask function holds for each token of a text, where that is one value for all of them.

    Such is the image that a token is of (Gemma 4: none, for text), or whether it is padding. The tables [B, T] become
    [B, length] in the function's closure. Others stay, and places beyond them raise `IndexError`.
    """
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for inner in held if isinstance(held, tuple | list) else (held,):
            if callable(inner):
                lengthen_tables(inner, length)
        if isinstance(held, torch.Tensor) and held.dim() == 2 and held.numel() and bool((held == held[0, 0]).all()):
            cell.cell_contents = held[0, 0].expand(held.shape[0], length)


def _seen(function: Callable[..., torch.Tensor], place: int) -> torch.Tensor:
    """Which of the tokens up to a place, and one of the future, the token there sees: bool [place + 2]."""
    zero, keys = torch.tensor(0), torch.arange(place + 2)
    return function(zero, zero, torch.tensor(place), keys).expand(keys.shape)


def _chunk_size(function: Callable[..., torch.Tensor], last: int) -> int | None:
    """Tokens of a chunk, if the tokens up to place `last` see those of their own chunk, and not beyond; else None."""
    chunk = next((place for place in range(1, last + 1) if not bool(_seen(function, place)[0])), None)
    if chunk is None:
        return None
    is_chunked = all(
        torch.equal(_seen(function, place), (keys <= place) & (keys >= place // chunk * chunk))
        for place in range(last + 1)
        for keys in (torch.arange(place + 2),)
    )
    return chunk if is_chunked else None


def _refused(received: str) -> UsageError:
    return UsageError(
        problem(
            "attention",
            received=received,
            expected="all tokens before, or a window of the newest",
            fix="this model cannot be exported exactly",
        )
    )
