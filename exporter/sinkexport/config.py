"""Options of an export."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from sinkrt.contract.constants import WINDOW_KINDS
from sinkrt.errors import UsageError, problem
from sinkrt.ring import Ring

from sinkexport.auto_target import CPU_DTYPE, auto_target
from sinkexport.targets import AUTO, ONNX, OPTIONS, Target, find_target
from sinkexport.variants.variant import AttentionVariant

if TYPE_CHECKING:
    from sinkexport.quant.ranges import Ranges
    from sinkexport.quant.recipe import Recipe
    from sinkexport.variants.affine import AffineFile
    from sinkexport.variants.head_windows import HeadWindowFile as BudgetFile
    from sinkexport.variants.sink_tuning import SinkTuningFile

WEIGHT_DTYPES: Mapping[str, Literal["float32", "float16"]] = {"fp32": "float32", "fp16": "float16"}
"""Command-line spelling -> dtype name of the manifest."""

MAX_INT8_WINDOW = 2**18
"""Tokens whose INT8 values can be summed in int32 with weights of 7 bits: 64 * 127 * 2^18 < 2^31."""

MAX_SINK_TOKENS, MAX_WINDOW, MAX_BATCH, MAX_CHUNK, MAX_DRAFTS = 2**16, 2**24, 2**12, 2**14, 255
"""Far more than is of use; beyond them a mistyped number fills the memory before anything refuses it."""

DEFAULT_NUM_SINK_TOKENS = 4
DEFAULT_WINDOW_SIZE = 1020


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Geometry and precision of a bundle.

    num_sink_tokens: S >= 0, first tokens of a stream that are kept forever (StreamingLLM, arXiv:2309.17453).
    window_size: W >= 1, most recent tokens kept.
    batch: B >= 1, streams decoded together, each with a position of its own.
    chunk_size: T, tokens that the prefill graph takes in one run, 1 .. W; None: the target's default (256 for ``cpu``
    and for ``tensorrt`` with plugins, 64 for others) or W, whichever is less. 1: no prefill graph, which exports
    faster.
    pin_system: a system message that the sinks must cover; num_sink_tokens is raised if it is longer.
    dtype: ``fp32 | fp16``, of weights, arithmetic and cache.
    target: ``onnx | cpu | tensorrt``, whose operators and layers the graphs are made for. ``auto`` becomes ``cpu``
    where the CPU library runs and has kernels for the dtype, else ``onnx``: this attribute and the manifest say which.
    sink_token: a token that begins every text of the bundle, or ``auto``
        (sinkexport/pipeline/sink_token.py); needs a sink.
    native: with target ``tensorrt``, standard ONNX operators alone, without the plugins of plugins/trt.
    recipe: how to quantise; None: not at all. calibration: what a recipe with static ranges or smoothing needs.
    kv: ``fp | int8``, the window's keys and values: INT8 with a scale for each key head and token. Sinks always stay in
    `dtype`. None: as the recipe says, or ``fp``.
    budgets: per-head windows (docs/head_windows.md), the longest of window_size tokens; None: all heads have it.
    sink_tuning: factors on the attention to token 0 (docs/sink_tuning.md); None: attention is the model's own.
    affine: scales and biases of the attention weights (docs/sink_tuning.md); None: they are those of the softmax.
    speculate: K, drafted tokens that one run of the verify graph takes (docs/speculation.md); None: no such graph.

    Raises: UsageError.
    """

    num_sink_tokens: int = DEFAULT_NUM_SINK_TOKENS
    window_size: int = DEFAULT_WINDOW_SIZE
    batch: int = 1
    dtype: str = "fp32"
    chunk_size: int | None = None
    pin_system: str | None = None
    target: str = AUTO
    recipe: Recipe | None = None
    calibration: Ranges | None = None
    kv: str | None = None
    native: bool = False
    sink_token: str | None = None
    sink_tuning: SinkTuningFile | None = None
    budgets: BudgetFile | None = None
    affine: AffineFile | None = None
    speculate: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        if self.target == AUTO:
            object.__setattr__(self, "target", auto_target(self.dtype).target.option)
        if self.recipe is not None:
            self._check_recipe(self.recipe)
        if self.calibration is not None and (self.recipe is None or not self.recipe.may_need_calibration):
            name = "none" if self.recipe is None else f"'{self.recipe.name}'"
            raise UsageError(
                problem(
                    "--calibration",
                    received=f"a file, and recipe {name}",
                    expected="a recipe with static ranges or smoothing",
                    fix="leave --calibration out or change --recipe",
                )
            )
        if self.has_int8_window:
            self._check_int8_window()
        if self.sink_tuning is not None:
            self._check_sink_tuning(self.sink_tuning)
        if self.affine is not None:
            self._check_affine()
        self.variant.check_window_size(self.window_size)
        if self.speculate is not None:
            self._check_speculate(self.speculate)
        if self.num_tokens_per_chunk > self.window_size:
            raise UsageError(
                problem(
                    "chunk_size",
                    received=self.chunk_size,
                    expected=f"at most W = {self.window_size}",
                    fix="lower --chunk or raise --window",
                )
            )

    def _check_numbers(self) -> None:
        for name, option, low, high in (
            ("num_sink_tokens", "--sink-tokens", 0, MAX_SINK_TOKENS),
            ("window_size", "--window", 1, MAX_WINDOW),
            ("batch", "--batch", 1, MAX_BATCH),
            ("chunk_size", "--chunk", 1, MAX_CHUNK),
            ("speculate", "--speculate", 1, MAX_DRAFTS),
        ):
            value = getattr(self, name)
            if name in ("chunk_size", "speculate") and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(
                    problem(name, received=repr(value), expected=f"an integer {low} .. {high}", fix=f"change {option}")
                )

    def _check_choices(self) -> None:
        if self.sink_token is not None and not self.num_sink_tokens:
            raise UsageError(
                problem(
                    "sink_token",
                    received="no sinks",
                    expected="at least one, to keep the token",
                    fix="use --sink-tokens 1",
                )
            )
        for name, value, choices in (
            ("dtype", self.dtype, WEIGHT_DTYPES),
            ("target", self.target, (*OPTIONS, AUTO)),
            ("kv", self.kv, (None, *WINDOW_KINDS)),
        ):
            if value not in choices:
                expected = " | ".join(choice for choice in choices if choice is not None)
                raise UsageError(problem(name, received=repr(value), expected=expected, fix=f"change --{name}"))
        if self.target == AUTO and not self.native:
            return
        if find_target(self.target, native=self.native) is None:
            raise UsageError(
                problem(
                    "native",
                    received=f"target {self.target}",
                    expected="target tensorrt",
                    fix="leave --native out: other targets are native anyway",
                )
            )
        if target_of(self).has_cpu_library and self.dtype != CPU_DTYPE:
            raise UsageError(
                problem(
                    "dtype",
                    received=f"{self.dtype} with target {self.target}",
                    expected=f"{CPU_DTYPE}: the CPU library has no other kernels",
                    fix=f"use --target {ONNX.option}, or make weights small with --recipe",
                )
            )

    def _check_recipe(self, recipe: Recipe) -> None:
        target = target_of(self)
        if not {target.recipes, target.name} & set(recipe.targets):
            raise UsageError(
                problem(
                    f"recipe '{recipe.name}'",
                    received=f"target {self.target}",
                    expected=" | ".join(recipe.targets),
                    fix="change --target or the recipe",
                )
            )
        if recipe.weights is not None and recipe.weights.bits == 4 and not target_of(self).has_int4_weights:
            raise UsageError(
                problem(
                    f"recipe '{recipe.name}'",
                    received="INT4 weights and --native",
                    expected="8 bits, a scale for each channel: standard operators have no INT4 matmul",
                    fix="leave --native out, for the plugin's, or choose int8-channel",
                )
            )
        if recipe.needs_calibration and self.calibration is None:
            raise UsageError(
                problem(
                    f"recipe '{recipe.name}'",
                    received="no calibration",
                    expected="ranges of this model's activations",
                    fix="run 'sinkexport calibrate' and pass its file as --calibration",
                )
            )

    def _check_sink_tuning(self, tuning: SinkTuningFile) -> None:
        if tuning.act is not None and not target_of(self).changes_attention:
            raise UsageError(
                problem(
                    "--sink-tuning",
                    received="act, and target tensorrt with the plugin",
                    expected="standard operators: the plugin has no state for what tokens received",
                    fix="add --native, or use --target onnx",
                )
            )
        if self.num_sink_tokens < 1:
            raise UsageError(
                problem(
                    "--sink-tuning",
                    received="0 sinks",
                    expected="at least 1: token 0 must stay",
                    fix="raise --sink-tokens",
                )
            )

    def _check_affine(self) -> None:
        if not target_of(self).changes_attention:
            raise UsageError(
                problem(
                    "--affine",
                    received="target tensorrt with the plugin",
                    expected="standard operators: the plugin has no inputs for scales and biases",
                    fix="add --native, or use --target onnx",
                )
            )
        if self.recipe is not None and self.recipe.needs_ranges:
            raise UsageError(
                problem(
                    "--affine",
                    received=f"recipe '{self.recipe.name}', which has static ranges or smooths",
                    expected="a recipe without: calibration saw the model's own attention",
                    fix="change --recipe",
                )
            )

    def _check_speculate(self, drafts: int) -> None:
        if target_of(self).option == "tensorrt":
            raise UsageError(
                problem(
                    "--speculate",
                    received="target tensorrt",
                    expected="target onnx or cpu: TensorRT has no graph that verifies drafts yet",
                    fix="leave --speculate out",
                )
            )
        for name, option, limit in (
            ("window_size", "--window", self.window_size - 1),
            ("chunk_size", "--chunk", self.num_tokens_per_chunk),
        ):
            if drafts > limit:
                raise UsageError(
                    problem(
                        "--speculate",
                        received=f"{drafts} drafted tokens and {name} {getattr(self, name) or limit}",
                        expected=f"at most {limit}",
                        fix=f"lower --speculate or raise {option}",
                    )
                )

    def _check_int8_window(self) -> None:
        if not target_of(self).has_int8_window:
            raise UsageError(
                problem(
                    "kv",
                    received="int8 with --native",
                    expected="fp",
                    fix="leave --native out: only the plugin writes an INT8 window",
                )
            )
        if self.window_size > MAX_INT8_WINDOW:
            raise UsageError(
                problem(
                    "window_size",
                    received=self.window_size,
                    expected=f"at most {MAX_INT8_WINDOW} with kv int8",
                    fix="lower --window or use --kv fp",
                )
            )

    @property
    def variant(self) -> AttentionVariant:
        """Changes that the export makes to the model's attention, without the files that state them."""
        return AttentionVariant(
            sink_tuning=None if self.sink_tuning is None else self.sink_tuning.facts,
            head_windows=None if self.budgets is None else self.budgets.windows,
            affine=self.affine,
        )

    @property
    def has_plugins(self) -> bool:
        """Whether the graphs have nodes of the TensorRT plugins."""
        return target_of(self).has_plugins

    @property
    def has_int8_window(self) -> bool:
        """Whether keys and values of the window are INT8."""
        return (self.kv or (self.recipe.kv if self.recipe is not None else "fp")) == "int8"

    @property
    def num_tokens_per_chunk(self) -> int:
        """T, with the default filled in."""
        return min(target_of(self).chunk_size, self.window_size) if self.chunk_size is None else self.chunk_size

    @property
    def capacity(self) -> int:
        """C = S + W, tokens."""
        return self.num_sink_tokens + self.window_size

    def ring(self, own_window: int | None, window_size: int | None = None) -> Ring:
        """Geometry of the cache of a layer, or of some of its heads.

        own_window: the layer's sliding window, tokens, the newest included; None: it sees all.
        window_size: the heads' window; None: W.

        S + W tokens, unless the sliding window is smaller: then exactly that window without sinks, as the model has it.
        """
        window_size = self.window_size if window_size is None else window_size
        if own_window is not None and own_window < self.num_sink_tokens + window_size:
            return Ring(0, own_window)
        return Ring(self.num_sink_tokens, window_size)


def target_of(config: ExportConfig) -> Target:
    """The target that a config chooses."""
    found = find_target(config.target, native=config.native)
    if found is None:
        raise ValueError(f"no target '{config.target}' with native {config.native}")
    return found
