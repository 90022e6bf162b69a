"""How far a bundle's logits may be from a model's: by errors where nothing is rounded, else by correlation."""

from __future__ import annotations

from typing import Any

import numpy as np
from sinkrt.contract import Manifest
from sinkrt.errors import UsageError, problem

from sinkexport.evaluation.comparison import default_tolerance
from sinkexport.model.experts import declared_experts
from sinkexport.model.loop_experts import loop_experts
from sinkexport.util.arrays import Logits
from sinkexport.variants.variant import AttentionVariant

INT8_WINDOW_TOLERANCE = 0.3
"""Largest error of a logit, as a share of the logits' spread, of a bundle whose window alone is INT8. Measured: 0.05
for SmolLM2-135M."""

MIN_CORRELATION = 0.6
"""Smallest correlation of a quantised bundle's logits with the model's, in the mean over positions.

Measured: 0.98 for SmolLM2-135M by int8-dynamic, 0.87 by int4-nearest. Tiny random models with INT4 weights have 0.82 to
0.99, single positions of an MoE down to 0.06. Unrelated logits have 0."""

MIN_HALF_CORRELATION = 0.95
"""The same of float16 from random caches. Measured: 0.995 for SmolLM2-135M, single logits off by 0.8 of
their spread."""


class Judge:
    """Compares logits of one bundle with those of its model."""

    def __init__(self, model: Any, manifest: Manifest, variant: AttentionVariant) -> None:
        self._manifest, self._variant = manifest, variant
        self.is_loose = self.is_rounded or (
            manifest.quantization is not None and bool(declared_experts(model) or loop_experts(model))
        )
        """Whether correlations count: rounding may change single logits by any amount, as where it makes tokens choose
        other experts."""

    @property
    def is_rounded(self) -> bool:
        """Whether weights or inputs of matmuls are quantised, or the window of a model whose later sinks are scaled
        down once they have received much attention: rounding decides then which are.

        Random caches are nothing that such a model was made for: SmolLM2-135M by int8-dynamic is left with a
        correlation of 0.47 from there.
        """
        quantization = self._manifest.quantization
        if quantization is None:
            return False
        is_act = self._variant.act is not None and quantization.kv == "int8"
        return is_act or (quantization.weights, quantization.activations) != ("float", "float")

    def errors(self, got: Logits, wanted: Logits, start: int, how: str, tolerance: float = 0.0) -> None:
        """got, wanted: [b, n, vocab] from position `start` on. tolerance: more than `default_tolerance`, or not.

        Raises: UsageError.
        """
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        spread = np.maximum(wanted.std(axis=-1, keepdims=True), 1e-9)
        errors = (np.abs(got - wanted) / spread).max(axis=(0, 2))  # [n]
        worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
        is_plain = self._manifest.quantization is None
        limit = max(default_tolerance(self._manifest), tolerance, 0.0 if is_plain else INT8_WINDOW_TOLERANCE)
        if not bool((errors <= limit).all()):
            raise _differs(
                f"logits that differ by {errors[worst]:.1e} of their spread at position {start + worst}, fed {how}",
                f"at most {limit:.1e}, which rounding explains",
                "this model cannot be exported exactly" if is_plain else "use --kv fp",
            )

    def correlation(
        self, got: Logits, wanted: Logits, how: str, stepped: Logits | None = None, *, is_half: bool = False
    ) -> None:
        """got, wanted: [b, n, vocab]. stepped: what the bundle's own steps gave, which a chunk may be like instead: at
        a single position a rounded model may be far from its own. is_half: float16 from random caches.

        Raises: UsageError.
        """
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
        quantization = self._manifest.quantization
        limit = MIN_HALF_CORRELATION if is_half else MIN_CORRELATION
        found_each = correlations(got, wanted)
        if stepped is not None:
            found_each = np.maximum(found_each, correlations(got, stepped.astype(np.float64)))
        found = float(found_each.mean())
        if not found >= limit:
            rounds = "float16" if quantization is None else f"the recipe '{quantization.recipe}'"
            finer = "choose a finer recipe; without a recipe this model is exported as it is, or refused"
            raise _differs(
                f"logits whose correlation with the model's is {found:.2f}, fed {how}",
                f"at least {limit}, whatever {rounds} rounds",
                "use --dtype fp32" if quantization is None else finer,
            )


def _differs(received: str, expected: str, fix: str) -> UsageError:
    return UsageError(
        problem("the exported graph differs from the model", received=received, expected=expected, fix=fix)
    )


def correlations(got: Logits, wanted: Logits) -> Logits:
    """[.., vocab] twice -> [..], Pearson's; 0 where one is constant, NaN where one is not finite."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (got, wanted))
    size = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    found: Logits = (a * b).sum(axis=-1) / np.maximum(size, 1e-30)
    return found
