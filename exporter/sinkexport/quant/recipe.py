"""Recipes: YAML files that say how a bundle is made small. Every key is explained in ``recipes/README.md``.

A recipe says nothing of any model; `Recipe.for_family` merges what it refines for one family of models.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import yaml
from sinkrt.errors import UsageError, problem

from sinkexport.targets import CPU, RECIPE_TARGETS

if TYPE_CHECKING:
    RecipeTarget = str
else:
    RecipeTarget = Literal[*RECIPE_TARGETS]

RECIPES_FOLDER = Path(__file__).parent.parent / "recipes"
"""The recipes that come with the package."""


class _Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Weights(_Spec):
    """How the matrix of a matmul is stored, W [K inputs, N outputs]: rounded to integers times a scale.

    bits: 8 or 4. granularity: what shares a scale: ``channel`` (an output) or ``block`` (`block_size` inputs of an
    output). symmetric: no zero points. scales: ``absmax``, or ``mse``: the clipping with the least squared error.
    rounding: ``nearest``, or ``gptq``: what changes results least for calibrated inputs (arXiv:2210.17323), which
    chooses scales by itself. int8: patterns (fnmatch) of modules that have 8 bits where the others have 4.
    """

    bits: Literal[8, 4]
    granularity: Literal["channel", "block"]
    block_size: Literal[16, 32, 64, 128, 256] | None = None
    symmetric: bool = True
    scales: Literal["absmax", "mse"] = "absmax"
    rounding: Literal["nearest", "gptq"] = "nearest"
    int8: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check_rounding(self) -> Weights:
        if self.rounding == "gptq" and self.scales != "absmax":
            raise ValueError("rounding: gptq chooses scales by itself: leave scales out")
        if self.int8 and self.bits != 4:
            raise ValueError("int8 goes with bits: 4, and with no other")
        return self

    @pydantic.model_validator(mode="after")
    def _check_block(self) -> Weights:
        if (self.granularity == "block") != (self.block_size is not None):
            raise ValueError("block_size goes with granularity: block, and with no other")
        return self


class Activations(_Spec):
    """How the inputs of matmuls are treated.

    mode: ``float``; ``dynamic``: INT8 with a scale that each token gets at run time; ``static``: INT8 with one range
    for the tensor, from calibration. sinks (static only): ``separate``: tokens 0 .. S-1 have a range of their own;
    ``excluded``: they have the others' and may be clipped; ``included``: one range for all tokens.
    keep_float (not with ``float``): patterns (fnmatch) of modules that are fed floating point all the same; their
    weights are rounded as others are.
    """

    mode: Literal["float", "dynamic", "static"]
    sinks: Literal["separate", "excluded", "included"] | None = None
    keep_float: tuple[str, ...] = ()

    @pydantic.model_validator(mode="after")
    def _check_sinks(self) -> Activations:
        if (self.mode == "static") != (self.sinks is not None):
            raise ValueError("sinks goes with mode: static, and with no other")
        if self.mode == "float" and self.keep_float:
            raise ValueError("keep_float is of no use with mode: float")
        return self


class Smooth(_Spec):
    """SmoothQuant (arXiv:2211.10438): channel j of an input is divided by max|x_j|^alpha / max|w_j|^(1 - alpha)."""

    alpha: float = pydantic.Field(ge=0.0, le=1.0)


class Calibration(_Spec):
    """How ranges are found by streaming text.

    method: ``minmax``, ``percentile`` (of |x|), ``entropy`` (least Kullback-Leibler divergence) or ``mse`` (least
    squared error); None where no ranges are needed. percentile: 50 .. 100. samples: pieces of text. length: tokens of
    each, past S + W so that the ring wraps. sink_tokens, window: the ring while calibrating. seed: which pieces.
    """

    method: Literal["minmax", "percentile", "entropy", "mse"] | None = None
    percentile: float | None = pydantic.Field(default=None, ge=50.0, le=100.0)
    samples: int = pydantic.Field(ge=1)
    length: int = pydantic.Field(ge=2)
    sink_tokens: int = pydantic.Field(default=4, ge=0)
    window: int = pydantic.Field(default=252, ge=1)
    seed: int = 0

    @pydantic.model_validator(mode="after")
    def _check_percentile(self) -> Calibration:
        if (self.method == "percentile") != (self.percentile is not None):
            raise ValueError("percentile goes with method: percentile, and with no other")
        return self


class Thresholds(_Spec):
    """What `sinkexport verify` holds a bundle to, against the model in floating point.

    perplexity_increase: of streaming perplexity, 0.005 for 0.5%. kl_divergence: mean, nats a token.
    top1_agreement: share of tokens whose likeliest successor is the same.
    """

    perplexity_increase: float = pydantic.Field(gt=0.0)
    kl_divergence: float = pydantic.Field(gt=0.0)
    top1_agreement: float = pydantic.Field(ge=0.0, le=1.0)


class Recipe(_Spec):
    """A whole recipe.

    weights: None: all stay in floating point, and only the window is quantised, or they are rounded to bfloat16.
    stored: of a quantised checkpoint, with nothing else: ``keep``: integers stay what they are where the target takes
    them, and are dequantised elsewhere; ``float``: all are dequantised. None: the recipe is for other checkpoints.
    floats: what weights of matmuls that are no integers are stored as: ``float32``, or ``bfloat16`` (target cpu).

    lm_head: the output projection: ``same`` as other weights, ``int8`` or ``float``. An embedding that is tied to it is
    stored once, as it is. embeddings: an untied one: ``int8`` (a scale for each row and block) or ``float``.
    keep_float: patterns (fnmatch) of modules whose weights and inputs stay in floating point, such as
    ``model.layers.0.*`` or ``*.down_proj``.
    kv: ``fp`` or ``int8``, the window's keys and values; sinks always stay in floating point.
    targets: which graphs can express it. families: by transformers' model_type, keys that replace those above.
    """

    schema_version: Literal[1]
    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    weights: Weights | None = None
    stored: Literal["keep", "float"] | None = None
    floats: Literal["float32", "bfloat16"] = "float32"
    activations: Activations
    smooth: Smooth | None = None
    lm_head: Literal["same", "int8", "float"] = "same"
    embeddings: Literal["int8", "float"] = "int8"
    keep_float: tuple[str, ...] = ()
    kv: Literal["fp", "int8"] = "fp"
    targets: tuple[RecipeTarget, ...] = pydantic.Field(min_length=1)
    calibration: Calibration | None = None
    thresholds: Thresholds
    families: Mapping[str, Mapping[str, Any]] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _check_calibration(self) -> Recipe:
        if self.needs_calibration and self.calibration is None:
            raise ValueError("calibration is needed by activations.mode: static, smooth and weights.rounding: gptq")
        if not self.needs_calibration and self.calibration is not None:
            raise ValueError("calibration is of no use without activations.mode: static, smooth or rounding: gptq")
        if self.calibration is not None and self.needs_ranges != (self.calibration.method is not None):
            raise ValueError("calibration.method goes with activations.mode: static or smooth, and with nothing else")
        if self.rounds_for_inputs and self.smooth is not None:
            raise ValueError("smooth does not go with weights.rounding: gptq, which rounds the weights as they were")
        return self

    @pydantic.model_validator(mode="after")
    def _check_weights(self) -> Recipe:
        weights, is_float = self.weights, self.activations.mode == "float"
        if weights is None:
            # What would quantise something else than the window is refused, so that its absence is no oversight.
            plain = is_float and not self.smooth and self.lm_head == "same" and self.embeddings == "float"
            if self.stored is not None:
                if not plain or self.floats != "float32":
                    raise ValueError("stored goes with activations.mode: float and embeddings: float, and nothing else")
                return self
            is_nothing = self.kv != "int8" and self.floats != "bfloat16"
            has_integers = not is_float or self.smooth or self.lm_head == "int8" or self.embeddings != "float"
            if is_nothing or has_integers or (self.lm_head != "same" and self.floats != "bfloat16"):
                allowed = "activations.mode: float, embeddings: float, kv: int8 or floats: bfloat16"
                raise ValueError(f"without weights a recipe has {allowed}")
            return self
        if self.stored is not None:
            raise ValueError("stored goes without weights: those of the checkpoint are not rounded again")
        if not is_float and weights.bits != 8:
            raise ValueError("INT8 activations need weights.bits: 8")
        if not is_float and weights.granularity != "channel":
            raise ValueError("INT8 activations need weights.granularity: channel")
        if weights.granularity == "channel" and not weights.symmetric:
            raise ValueError("weights.granularity: channel needs symmetric: true")
        return self

    @pydantic.model_validator(mode="after")
    def _check_floats(self) -> Recipe:
        if self.floats == "bfloat16" and self.targets != (CPU.name,):
            raise ValueError("floats: bfloat16 needs targets: [cpu], which alone has kernels for it")
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether an export with this recipe needs a calibration file."""
        return self.needs_ranges or self.rounds_for_inputs

    @property
    def needs_ranges(self) -> bool:
        """Whether a calibration has to find ranges of inputs."""
        return self.activations.mode == "static" or self.smooth is not None

    @property
    def rounds_for_inputs(self) -> bool:
        """Whether weights are rounded with GPTQ."""
        return self.weights is not None and self.weights.rounding == "gptq"

    @property
    def may_need_calibration(self) -> bool:
        """Whether an export may need one once the recipe is refined for a family."""
        return self.needs_calibration or any("calibration" in keys for keys in self.families.values())

    def keeps_float(self, module: str) -> bool:
        """Whether a module, such as ``model.layers.3.mlp.down_proj``, stays in floating point."""
        return _matches(module, self.keep_float)

    def weight_bits(self, module: str) -> Literal[8, 4]:
        """Bits of a module whose weights are rounded as `weights` says."""
        if self.weights is None:
            raise ValueError(f"recipe '{self.name}' without weights")
        return 8 if _matches(module, self.weights.int8) else self.weights.bits

    def input_mode(self, module: str) -> str:
        """How the input of a module is treated that does not stay in floating point: ``float | dynamic | static``."""
        return "float" if _matches(module, self.activations.keep_float) else self.activations.mode

    def with_kv(self, kv: str) -> Recipe:
        """The recipe with another window; `kv` is ``fp | int8``."""
        return self if kv == self.kv else self.model_copy(update={"kv": kv})

    def for_family(self, family: str) -> Recipe:
        """The recipe with what it refines for a family of models (transformers' model_type) filled in.

        Raises: UsageError if the refined recipe is not valid.
        """
        refinements = self.families.get(family)
        if not refinements:
            return self
        merged = _merged(self.model_dump(exclude_none=True), refinements)
        return parse_recipe({**merged, "families": {}}, f"recipe '{self.name}' for {family}")


def load_recipe(name_or_file: str) -> Recipe:
    """A recipe of the package by its name, or one of the user's by the path of its file.

    Raises: UsageError if there is none, or it is not a valid recipe: one line that names the key.
    """
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        path = RECIPES_FOLDER / f"{name_or_file}.yaml"
        if name_or_file not in recipe_names():
            raise UsageError(
                problem(
                    "recipe",
                    received=f"'{name_or_file}'",
                    expected=" | ".join(recipe_names()),
                    fix="choose one of them or pass a .yaml file",
                )
            )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            problem(
                "recipe", received=f"'{path}' ({reason})", expected="a readable YAML file", fix="see recipes/README.md"
            )
        ) from None
    return parse_recipe(raw, f"recipe '{path}'")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def parse_recipe(raw: Any, where: str) -> Recipe:
    """Validate what a recipe's file holds.

    Raises: UsageError that names the first wrong key.
    """
    try:
        recipe = Recipe.model_validate_json(_as_json(raw))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "its keys"
        raise UsageError(
            problem(
                f"{where}: {key}",
                received=_received(first),
                expected=_expected(first),
                fix="recipes/README.md explains every key",
            )
        ) from None
    for family in recipe.families:
        recipe.for_family(family)
    return recipe


def _matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def _as_json(raw: Any) -> str:
    """Lists become tuples and numbers floats in pydantic's JSON mode, which YAML needs as well."""
    try:
        return json.dumps(raw)
    except TypeError:
        return json.dumps(str(raw))  # a date, a set: pydantic says what is wrong with it


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings are merged; anything else replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return result


def _received(error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return "nothing"
    value = error["input"]
    if isinstance(value, Mapping):
        return "keys that do not fit"
    return repr(value)[:60]


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "no such key"
    if error["type"] == "missing":
        return "a value"
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return message[:1].lower() + message[1:] if not message.startswith("INT8") else message
