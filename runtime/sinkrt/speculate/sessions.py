"""Parts of a `Session` that drafters need: of the one that they guess for, and of a draft model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sinkrt.contract import Manifest


class BundleSession(Protocol):
    """An open bundle."""

    @property
    def bundle(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def num_drafts(self) -> int: ...


class Rewinding(Protocol):
    """Part of a `sinkrt.rewind.Rewinder` that drafters need."""

    def mark(self) -> None: ...

    def back_to(self, position: int) -> None: ...


class DraftSession(BundleSession, Protocol):
    """A session of one stream that a drafter feeds."""

    @property
    def batch(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def position(self) -> npt.NDArray[np.int64]: ...

    @property
    def logits(self) -> npt.NDArray[np.float32]: ...

    def recent_ids(self, stream: int = 0) -> npt.NDArray[np.int64]: ...

    def rewinder(self, count: int) -> Rewinding: ...

    def prefill(self, ids: npt.ArrayLike) -> Any: ...

    def step(self, ids: npt.ArrayLike) -> Any: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...
