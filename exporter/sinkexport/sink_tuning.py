"""The file that says how attention to sinks is changed, for people to review and for `export --sink-tuning`.

JSON with one line for each layer. A factor of a head multiplies the attention weight of token 0 before the weights are
normalised again (ZeroTuning, arXiv:2505.11739), which is the same as adding its logarithm to that token's logit. 1
changes nothing. `sinkexport tune` finds factors; a file written by hand is as good.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from sinkrt.contract import SinkTuning
from sinkrt.errors import UsageError, problem

FORMAT: Literal["sinkexport sink tuning"] = "sinkexport sink tuning"
FILE_SCHEMA_VERSION: Literal[1] = 1
Factor = Annotated[float, pydantic.Field(gt=0.0, le=1000.0, allow_inf_nan=False)]


class _Spec(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class TunedModel(_Spec):
    """Of what model the factors are. name is for people; the rest is checked."""

    name: str
    architecture: str
    num_layers: int = pydantic.Field(ge=1)
    num_q_heads: int = pydantic.Field(ge=1)


class SinkTuningFile(_Spec):
    """first_token_scale: [L][Hq]. found: how, in words; nothing reads it."""

    format: Literal["sinkexport sink tuning"] = FORMAT
    schema_version: Literal[1] = FILE_SCHEMA_VERSION
    model: TunedModel
    found: str = ""
    first_token_scale: tuple[tuple[Factor, ...], ...]

    @pydantic.model_validator(mode="after")
    def _check_shape(self) -> SinkTuningFile:
        wanted = (self.model.num_layers, {self.model.num_q_heads})
        if (len(self.first_token_scale), {len(layer) for layer in self.first_token_scale}) != wanted:
            raise ValueError(f"first_token_scale must have {self.model.num_layers} layers of {self.model.num_q_heads}")
        return self

    def to_json(self) -> str:
        """One line for each layer."""
        head = json.dumps(self.model_dump(exclude={"first_token_scale"}), indent=1).removesuffix("\n}")
        layers = ",\n  ".join(json.dumps(layer) for layer in self.first_token_scale)
        return f'{head},\n "first_token_scale": [\n  {layers}\n ]\n}}\n'

    @property
    def facts(self) -> SinkTuning:
        """The manifest's entry. The hash is of the content, however it is laid out."""
        return SinkTuning(hashlib.sha256(self.to_json().encode()).hexdigest(), self.first_token_scale)

    def check_model(self, architecture: str, num_layers: int, num_q_heads: int) -> None:
        """Raises: UsageError if the factors are of a model of another shape."""
        of = self.model
        for what, ours, theirs in (
            ("architecture", of.architecture, architecture),
            ("layers", of.num_layers, num_layers),
            ("query heads", of.num_q_heads, num_q_heads),
        ):
            if ours != theirs:
                raise UsageError(problem("--sink-tuning", received=f"a file for '{of.name}', {what} {ours}",
                                         expected=f"{what} {theirs}", fix="tune this model"))  # fmt: skip

    def check_sinks(self, num_sinks: Sequence[int]) -> None:
        """num_sinks: of each layer. Raises: UsageError if a layer that keeps none has a factor."""
        for layer, (factors, kept) in enumerate(zip(self.first_token_scale, num_sinks, strict=True)):
            if not kept and set(factors) != {1.0}:
                raise UsageError(problem("--sink-tuning", expected="1 for all of its heads",
                                         received=f"factors in layer {layer}, which keeps no sinks",
                                         fix="change the file, or lower --window"))  # fmt: skip


def load_sink_tuning(path: Path) -> SinkTuningFile:
    """Read and check a file.

    Raises: UsageError if it cannot be read or is no such file, naming the first thing that is wrong.
    """

    def refused(reason: str) -> UsageError:
        return UsageError(problem("--sink-tuning", received=f"'{path}' ({reason})",
                                  expected="a file of 'sinkexport tune'", fix="see docs/sink_tuning.md"))  # fmt: skip

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise refused(error.strerror or str(error)) from None
    try:
        return SinkTuningFile.model_validate_json(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise refused(f"{where}: {first['msg']}" if where else first["msg"]) from None
