"""The file that a calibration writes, `calibration.json`: ranges of one model's inputs, for people and for `export`.

JSON, because it is read and compared: one line for each input's ranges and for each of its vectors, numbers of 6
digits. What an export uses are exactly the numbers of the file. They take tens of kilobytes a layer, so that no binary
file is needed, except for weights that were rounded for these inputs: those lie beside it, in a file of the same name
that ends in ``.safetensors`` and whose hash is here.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
from sinkrt.contract import hash_file
from sinkrt.errors import UsageError, problem

from sinkexport.calibration.rounding import RoundedFile
from sinkexport.quant.ranges import InputRange
from sinkexport.quant.recipe import Calibration, Recipe, Smooth, Weights
from sinkexport.quant.weight import Rounded, WeightScheme
from sinkexport.util.files import first_problem

FILE_SCHEMA_VERSION: Literal[1] = 1
FORMAT: Literal["sinkexport calibration"] = "sinkexport calibration"
FINGERPRINT_VALUES = 4096
"""Values of each weight, at most: enough to distinguish two trainings of one architecture."""

Floats = npt.NDArray[np.float64]


class _Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Span(_Spec):
    """Absolute values. highest: the largest that was seen; range: what INT8 is to express."""

    highest: float = pydantic.Field(ge=0.0, allow_inf_nan=False)
    range: float = pydantic.Field(ge=0.0, allow_inf_nan=False)


class InputFacts(_Spec):
    """One input. modules: the layers that read it.

    rest, sinks, all: of tokens S, S+1, .. of each piece, of tokens 0 .. S-1 (None: S = 0), and of all tokens, after
    the division by `divisors`.
    channels: [K], largest absolute value of each channel in the tokens that count, as the model computes it.
    divisors: [K], SmoothQuant's, all > 0; None: the recipe does not smooth.
    """

    modules: tuple[str, ...] = pydantic.Field(min_length=1)
    rest: Span
    sinks: Span | None
    all: Span
    channels: tuple[float, ...]
    divisors: tuple[float, ...] | None

    @pydantic.model_validator(mode="after")
    def _check_divisors(self) -> InputFacts:
        if self.divisors is not None and (len(self.divisors) != len(self.channels) or min(self.divisors) <= 0):
            raise ValueError("a divisor > 0 for each channel")
        return self


class CalibratedModel(_Spec):
    """Which model it was. fingerprint: see `fingerprint`."""

    name: str
    architecture: str
    fingerprint: str


class CalibrationText(_Spec):
    """What was streamed. sha256: of the text, UTF-8. tokens: of the whole text; streamed: those of the pieces."""

    sha256: str
    tokens: int
    streamed: int


class RoundedWeights(_Spec):
    """Weights that were rounded for the inputs. weights, keep_float: the recipe's keys. sha256: of their file."""

    weights: Weights
    keep_float: tuple[str, ...]
    sha256: str


class CalibrationFile(_Spec):
    """All of `calibration.json`; implements `Ranges`.

    recipe: its name, for people. calibration, smooth: the recipe's keys that the numbers depend on, and
    smooth_sinks: whether sinks counted for `channels`. rounded_weights: None: the recipe rounds to the nearest.
    producer: versions of the packages that computed it.
    """

    format: Literal["sinkexport calibration"]
    schema_version: Literal[1]
    model: CalibratedModel
    recipe: str
    calibration: Calibration
    smooth: Smooth | None
    smooth_sinks: bool
    rounded_weights: RoundedWeights | None = None
    text: CalibrationText
    producer: Mapping[str, str]
    inputs: tuple[InputFacts, ...]
    _rounded_file: RoundedFile | None = pydantic.PrivateAttr(default=None)

    def with_rounded_file(self, path: Path) -> CalibrationFile:
        """The same with the file that its rounded weights lie in.

        Raises: UsageError if it is not there, or another one.
        """
        if self.rounded_weights is None:
            return self
        found = self.model_copy()
        found._rounded_file = RoundedFile(path)
        if hash_file(path).sha256 != self.rounded_weights.sha256:
            raise UsageError(
                problem(
                    "rounded weights",
                    received=f"'{path}', of another calibration",
                    expected="the file that was written beside the ranges",
                    fix="keep the two together, or calibrate again",
                )
            )
        return found

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file (hex)."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @functools.cached_property
    def _by_module(self) -> dict[str, InputFacts]:
        return {module: facts for facts in self.inputs for module in facts.modules}

    @property
    def num_sink_tokens(self) -> int:
        """Tokens whose ranges are apart."""
        return self.calibration.sink_tokens

    def input_range(self, module: str) -> InputRange:
        """See `Ranges`."""
        facts = self._facts(module)
        return InputRange(facts.rest.range, None if facts.sinks is None else facts.sinks.range, facts.all.range)

    def divisors(self, module: str) -> Floats | None:
        """See `Ranges`."""
        found = self._facts(module).divisors
        return None if found is None else np.array(found)

    def rounded(self, module: str, scheme: WeightScheme, num_inputs: int) -> Rounded:
        """See `Ranges`."""
        if self._rounded_file is None or module not in self._rounded_file:
            raise UsageError(
                problem(
                    "calibration",
                    received=f"no rounded weights of '{module}'",
                    expected="those of all layers that are quantised",
                    fix="calibrate again with this recipe",
                )
            )
        return self._rounded_file.read(module, scheme, num_inputs)

    def readers(self, module: str) -> tuple[str, ...]:
        """See `Ranges`."""
        return self._facts(module).modules

    def to_json(self) -> str:
        """The file's text: the same facts, the same bytes."""
        head = self.model_dump(exclude={"inputs"}, mode="json", exclude_none=True)
        head.setdefault("smooth", None)
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        inputs = ",\n".join(
            "  {" + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()) + "}"
            for facts in self.model_dump(include={"inputs"}, mode="json")["inputs"]
        )
        return "{\n" + "\n".join(lines) + f'\n "inputs": [\n{inputs}\n ]\n}}\n'

    def _facts(self, module: str) -> InputFacts:
        if module not in self._by_module:
            raise UsageError(
                problem(
                    "calibration",
                    received=f"nothing of '{module}'",
                    expected="ranges of all layers that are quantised",
                    fix="calibrate again with this version",
                )
            )
        return self._by_module[module]

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse numbers that were computed for another recipe.

        Raises: UsageError that names the key.
        """
        for key, ours, theirs in (
            ("calibration", self.calibration, recipe.calibration),
            ("smooth", self.smooth, recipe.smooth),
            ("activations.sinks: included", self.smooth_sinks, smooths_sinks(recipe)),
            ("weights", *(None if x is None else x.weights for x in (self.rounded_weights, rounding_of(recipe)))),
            ("keep_float", *(None if x is None else x.keep_float for x in (self.rounded_weights, rounding_of(recipe)))),
        ):
            if ours != theirs:
                raise UsageError(
                    problem(
                        f"calibration: {key}",
                        received=_shown(ours),
                        expected=f"{_shown(theirs)}, as in recipe '{recipe.name}'",
                        fix="run 'sinkexport calibrate' with this recipe",
                    )
                )

    def check_model(self, model: Any) -> None:
        """Refuse the ranges of another model.

        Raises: UsageError.
        """
        if fingerprint(model) != self.model.fingerprint:
            raise UsageError(
                problem(
                    "calibration",
                    received=f"ranges of another model, '{self.model.name}' ({self.model.architecture})",
                    expected="ranges of this one",
                    fix="run 'sinkexport calibrate' on it",
                )
            )


def smooths_sinks(recipe: Recipe) -> bool:
    """Whether sinks count for the channels' largest values: only where they share the others' range."""
    return recipe.smooth is not None and recipe.activations.sinks == "included"


def rounding_of(recipe: Recipe, sha256: str = "") -> RoundedWeights | None:
    """What a recipe rounds for inputs, and into which file."""
    if not recipe.rounds_for_inputs or recipe.weights is None:
        return None
    return RoundedWeights(weights=recipe.weights, keep_float=recipe.keep_float, sha256=sha256)


def rounded_path(path: Path) -> Path:
    """Where the rounded weights of the calibration `path` lie."""
    return path.with_suffix(".safetensors")


def load_calibration(path: Path) -> CalibrationFile:
    """Read and check a calibration file. Rounded weights, which lie beside it, are not checked.

    Raises: UsageError if it cannot be read, is damaged, or is no such file.
    """

    def refused(reason: str) -> UsageError:
        return UsageError(
            problem(
                "calibration",
                received=f"'{path}' ({reason})",
                expected="a file of 'sinkexport calibrate'",
                fix="calibrate again",
            )
        )

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise refused(error.strerror or str(error)) from None
    try:
        parsed = json.loads(raw)
    except ValueError:
        raise refused("no JSON, or cut short") from None
    if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
        raise refused("something else")
    if parsed.get("schema_version") != FILE_SCHEMA_VERSION:
        raise refused(f"format version {parsed.get('schema_version')!r}, this version reads {FILE_SCHEMA_VERSION}")
    try:
        return CalibrationFile.model_validate_json(raw)
    except pydantic.ValidationError as error:
        raise refused(first_problem(error)) from None


def rounded(value: float | np.floating[Any]) -> float:
    """Round to the 6 digits of the file."""
    return float(f"{float(value):.6g}")


def fingerprint(model: Any) -> str:
    """sha256 over names, shapes and a spread of values of all weights, rounded to half precision.

    So it is the same in fp32 and fp16, and another after training.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, -(-flat.numel() // FINGERPRINT_VALUES))
        digest.update(flat[::step].half().numpy().tobytes())
    return digest.hexdigest()


def _shown(value: Any) -> str:
    if isinstance(value, pydantic.BaseModel):
        return ", ".join(f"{key} {item}" for key, item in value.model_dump(exclude_none=True).items())
    return str(value).lower()
