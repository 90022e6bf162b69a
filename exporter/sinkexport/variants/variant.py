"""Changes of a model's attention that need no training, in one value that travels from the export to the checks.

Three changes, each of its own file and each independent of the others: factors on the attention to sinks
(`sink_tuning`), per-head windows (`head_windows`), and scales and biases of the attention weights (`affine`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkrt.contract import ActTuning, HeadWindow, Manifest, SinkTuning
from sinkrt.errors import UsageError, problem

if TYPE_CHECKING:
    from sinkexport.variants.affine import AffineFile

HeadWindows = tuple[tuple[int, ...], ...]
"""[L][Hkv], tokens: the window of each key head."""


@dataclasses.dataclass(frozen=True)
class AttentionVariant:
    """A model's attention as a bundle has it; by default the model's own.

    sink_tuning: factors on the attention to sinks; None: attention to them is the model's own. Needs a sink.
    head_windows: per-head windows, the longest of W tokens; None: all heads keep W tokens.
    affine: scales and biases of the attention weights; None: they are those of the softmax.
    """

    sink_tuning: SinkTuning | None = None
    head_windows: HeadWindows | None = None
    affine: AffineFile | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is changed."""
        return self == PLAIN

    @property
    def act(self) -> ActTuning | None:
        """Calibration of later sinks; None: they stay as they are."""
        return None if self.sink_tuning is None else self.sink_tuning.act

    def windows(self, layer: int, num_kv_heads: int, window_size: int) -> tuple[int, ...]:
        """[Hkv], tokens: the window of each key head of a layer. window_size: W."""
        return (window_size,) * num_kv_heads if self.head_windows is None else self.head_windows[layer]

    def shortest_window(self, window_size: int) -> int:
        """Tokens of the shortest window of a head. window_size: W."""
        return window_size if self.head_windows is None else min(map(min, self.head_windows))

    def check_window_size(self, window_size: int) -> None:
        """Make sure that W is the longest per-head window.

        Raises: UsageError.
        """
        longest = window_size if self.head_windows is None else max(map(max, self.head_windows))
        if longest != window_size:
            raise UsageError(
                problem(
                    "--window",
                    received=f"{window_size}, and per-head windows of up to {longest} tokens",
                    expected="the longest per-head window",
                    fix=f"pass --window {longest}",
                )
            )

    def manifest_entries(self, num_layers: int, num_q_heads: int, groups: Iterable[HeadWindow]) -> dict[str, Any]:
        """Fields of `Manifest` by name. groups: key heads by the window that their cache has."""
        return {
            "sink_tuning": self.sink_tuning,
            "head_windows": None if self.head_windows is None else tuple(groups),
            "affine_attention": None if self.affine is None else self.affine.facts(num_layers, num_q_heads),
        }

    @classmethod
    def of_bundle(cls, bundle: Path, manifest: Manifest) -> AttentionVariant:
        """Read the variant of a bundle.

        Raises: UsageError if its affine file cannot be read; BundleError if that is not the one that was exported.
        """
        from sinkexport.variants.affine import affine_of

        return cls(
            sink_tuning=manifest.sink_tuning,
            head_windows=head_windows_of(manifest),
            affine=affine_of(bundle, manifest),
        )


PLAIN = AttentionVariant()
"""The model's own attention."""


def head_windows_of(manifest: Manifest) -> HeadWindows | None:
    """Per-head windows of a bundle; None: all of its heads keep W tokens."""
    if manifest.head_windows is None:
        return None
    facts = manifest.model
    by_head = {(group.layer, head): group.window_size for group in manifest.head_windows for head in group.kv_heads}
    return tuple(
        tuple(by_head.get((layer, head), manifest.stream.window_size) for head in range(facts.num_kv_heads))
        for layer in range(facts.num_layers)  # without entry: no cache, but recurrent states
    )
