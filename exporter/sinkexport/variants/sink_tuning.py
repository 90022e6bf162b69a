"""The file that says how attention to sinks is changed, for people to review and for `export --sink-tuning`.

JSON with one line for each layer. A factor of a head multiplies the attention weight of token 0 before the weights are
normalised again (ZeroTuning, arXiv:2505.11739). Its logarithm, added to that token's logit, does the same. 1 changes
nothing. `sinkexport tune` finds factors; a file written by hand is as good.

`act`, if it is there, scales later sinks down in some heads (ACT, arXiv:2406.15765); `sinkexport analyze` proposes
which ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import pydantic
from sinkrt.contract import ActTuning, SinkTuning
from sinkrt.errors import UsageError, problem

from sinkexport.variants.head_file import HeadFile, ModelOfFile, Spec

FORMAT: Literal["sinkexport sink tuning"] = "sinkexport sink tuning"
FILE_SCHEMA_VERSION: Literal[1] = 1
Factor = Annotated[float, pydantic.Field(gt=0.0, le=1000.0, allow_inf_nan=False)]


class TunedModel(ModelOfFile):
    """Model of a file of factors."""

    num_q_heads: int = pydantic.Field(ge=1)

    @property
    def num_heads(self) -> int:
        return self.num_q_heads


class ActPart(Spec):
    """Calibration of later sinks, see `sinkrt.contract.ActTuning`. alpha and beta are the paper's; heads: [L][Hq]."""

    alpha: float = pydantic.Field(default=5.0, ge=1.0, allow_inf_nan=False)
    beta: float = pydantic.Field(default=0.4, ge=0.0, lt=1.0)
    min_queries: int = pydantic.Field(default=32, ge=1)
    heads: tuple[tuple[pydantic.StrictBool, ...], ...]

    @property
    def facts(self) -> ActTuning:
        """The manifest's entry."""
        return ActTuning(alpha=self.alpha, beta=self.beta, min_queries=self.min_queries, heads=self.heads)


class SinkTuningFile(HeadFile):
    """first_token_scale: [L][Hq]. act: None: later sinks stay as they are. found: how, in words; nothing reads it."""

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
    act: ActPart | None = None
    first_token_scale: tuple[tuple[Factor, ...], ...]

    @pydantic.model_validator(mode="after")
    def _check_act(self) -> Self:
        wanted = [len(layer) for layer in self.first_token_scale]
        if self.act is not None and [len(layer) for layer in self.act.heads] != wanted:
            raise ValueError("act.heads must have as many layers and query heads as first_token_scale")
        return self

    @property
    def facts(self) -> SinkTuning:
        """The manifest's entry."""
        act = None if self.act is None else self.act.facts
        return SinkTuning(sha256=self.sha256, first_token_scale=self.first_token_scale, act=act)

    def check_sinks(self, num_sinks: Sequence[int]) -> None:
        """num_sinks: of each layer. Raises: UsageError if a layer that keeps none has a factor or a calibrated head."""
        for layer, (factors, kept) in enumerate(zip(self.first_token_scale, num_sinks, strict=True)):
            if not kept and set(factors) != {1.0}:
                raise UsageError(
                    problem(
                        "--sink-tuning",
                        expected="1 for all of its heads",
                        received=f"factors in layer {layer}, which keeps no sinks",
                        fix="change the file, or lower --window",
                    )
                )
            if not kept and self.act is not None and any(self.act.heads[layer]):
                raise UsageError(
                    problem(
                        "--sink-tuning",
                        expected="false for all of its heads",
                        received=f"act in layer {layer}, which keeps no sinks",
                        fix="change the file, or lower --window",
                    )
                )
