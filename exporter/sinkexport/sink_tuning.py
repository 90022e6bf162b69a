"""The file that says how attention to sinks is changed, for people to review and for `export --sink-tuning`.

JSON with one line for each layer. A factor of a head multiplies the attention weight of token 0 before the weights are
normalised again (ZeroTuning, arXiv:2505.11739), which is the same as adding its logarithm to that token's logit. 1
changes nothing. `sinkexport tune` finds factors; a file written by hand is as good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pydantic
from sinkrt.contract import SinkTuning
from sinkrt.errors import UsageError, problem

from sinkexport.head_file import HeadFile, ModelOfFile

FORMAT: Literal["sinkexport sink tuning"] = "sinkexport sink tuning"
FILE_SCHEMA_VERSION: Literal[1] = 1
Factor = Annotated[float, pydantic.Field(gt=0.0, le=1000.0, allow_inf_nan=False)]


class TunedModel(ModelOfFile):
    """Of what model the factors are."""

    num_q_heads: int = pydantic.Field(ge=1)

    @property
    def num_heads(self) -> int:
        return self.num_q_heads


class SinkTuningFile(HeadFile):
    """first_token_scale: [L][Hq]. found: how, in words; nothing reads it."""

    OPTION = "--sink-tuning"
    ROWS = "first_token_scale"
    HEADS = "query heads"
    MADE_BY = "sinkexport tune"
    DOCS = "docs/sink_tuning.md"
    FIX = "tune this model"

    format: Literal["sinkexport sink tuning"] = FORMAT
    schema_version: Literal[1] = FILE_SCHEMA_VERSION
    model: TunedModel
    found: str = ""
    first_token_scale: tuple[tuple[Factor, ...], ...]

    @property
    def facts(self) -> SinkTuning:
        """The manifest's entry."""
        return SinkTuning(self.sha256, self.first_token_scale)

    def check_sinks(self, num_sinks: Sequence[int]) -> None:
        """num_sinks: of each layer. Raises: UsageError if a layer that keeps none has a factor."""
        for layer, (factors, kept) in enumerate(zip(self.first_token_scale, num_sinks, strict=True)):
            if not kept and set(factors) != {1.0}:
                raise UsageError(problem("--sink-tuning", expected="1 for all of its heads",
                                         received=f"factors in layer {layer}, which keeps no sinks",
                                         fix="change the file, or lower --window"))  # fmt: skip
