"""Arrays that evaluation and reference hand to each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
"""Token ids: [B, N], or [N] of one text."""

Logits = npt.NDArray[np.float32]
"""[.., vocab]."""
