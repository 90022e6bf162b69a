"""Files with a number for each head of each layer: JSON for people to review, given to the export."""

from __future__ import annotations

import abc
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pydantic
from sinkrt.errors import UsageError, problem

from sinkexport.util.files import first_problem


class Spec(pydantic.BaseModel):
    """Unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ModelOfFile(Spec):
    """Model that a file is for. name is for people; the rest is checked."""

    name: str
    architecture: str
    num_layers: int = pydantic.Field(ge=1)

    @property
    @abc.abstractmethod
    def num_heads(self) -> int:
        """Heads of the kind that the file has a number for."""


class HeadFile(Spec):
    """A subclass has the fields `model` and the one that ROWS names, [L][heads], which comes last.

    OPTION: of the export that takes the file. HEADS: what they are called. MADE_BY, DOCS, FIX: for messages.
    """

    OPTION: ClassVar[str]
    ROWS: ClassVar[str]
    HEADS: ClassVar[str]
    MADE_BY: ClassVar[str]
    DOCS: ClassVar[str]
    FIX: ClassVar[str]

    @property
    def _of(self) -> ModelOfFile:
        model: ModelOfFile = getattr(self, "model")  # noqa: B009 - a field of subclasses
        return model

    @property
    def _rows(self) -> Sequence[Sequence[Any]]:
        rows: Sequence[Sequence[Any]] = getattr(self, self.ROWS)
        return rows

    @pydantic.model_validator(mode="after")
    def _check_shape(self) -> Self:
        of = self._of
        if (len(self._rows), {len(layer) for layer in self._rows}) != (of.num_layers, {of.num_heads}):
            raise ValueError(f"{self.ROWS} must have {of.num_layers} layers of {of.num_heads} {self.HEADS}")
        return self

    @property
    def sha256(self) -> str:
        """Hash of the content, however it is laid out (hex)."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """One line for each layer; keys that may be absent are, if they are None."""
        text = json.dumps(self.model_dump(exclude_none=True), indent=1)
        # A list of numbers, broken into lines, is put together again: inside of strings there are no line breaks.
        return re.sub(r"\[\n([^\[\]]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"

    def check_model(self, architecture: str, num_layers: int, num_heads: int) -> None:
        """Raises: UsageError if the file is of a model of another shape."""
        of = self._of
        for what, ours, theirs in (
            ("architecture", of.architecture, architecture),
            ("layers", of.num_layers, num_layers),
            (self.HEADS, of.num_heads, num_heads),
        ):
            if ours != theirs:
                raise UsageError(
                    problem(
                        self.OPTION,
                        received=f"a file for '{of.name}', {what} {ours}",
                        expected=f"{what} {theirs}",
                        fix=self.FIX,
                    )
                )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file.

        Raises: UsageError if it cannot be read or is no such file, naming the first thing that is wrong.
        """

        def refused(reason: str) -> UsageError:
            return UsageError(
                problem(
                    cls.OPTION,
                    received=f"'{path}' ({reason})",
                    expected=f"a file of '{cls.MADE_BY}'",
                    fix=f"see {cls.DOCS}",
                )
            )

        try:
            raw = path.read_bytes()
        except OSError as error:
            raise refused(error.strerror or str(error)) from None
        try:
            return cls.model_validate_json(raw)
        except pydantic.ValidationError as error:
            raise refused(first_problem(error)) from None
