"""A constant that a model's own code computes of its parameters or of its configuration, as it is found in a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class DerivedConstant:
    """Numbers that depend on nothing but parameters and the configuration.

    values: the result, of any shape. sources: the parameters, by their names in the trace; none: it depends on the
    configuration alone.
    """

    values: npt.NDArray[np.float32]
    sources: Mapping[str, npt.NDArray[Any]]
