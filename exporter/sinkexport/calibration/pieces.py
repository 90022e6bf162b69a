"""Cut a text into pieces and pick those that a calibration streams."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sinkrt.errors import UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.quant.recipe import Calibration

Ids = npt.NDArray[np.int64]


def choose_pieces(tokenizer: SourceTokenizer, text: str, asked: Calibration) -> tuple[Ids, int]:
    """Pieces of a text, ids [samples, length], and how many tokens it has.

    The text is cut into pieces. The seed picks some; they stay in order. Each begins as a stream does, with
    what the tokenizer puts before a text.

    Raises: UsageError if the text is too short.
    """
    ids = np.asarray(tokenizer.encode(text, special=False), np.int64)
    beginning = np.asarray(tokenizer.beginning, np.int64)
    own = asked.length - len(beginning)
    if own < 1 or len(ids) < asked.samples * own:
        raise UsageError(
            problem(
                "text",
                received=f"{len(ids):,} tokens",
                expected=f"{asked.samples} pieces of {asked.length:,} tokens",
                fix="use a longer text, or lower calibration.samples or length",
            )
        )
    chosen = np.sort(np.random.default_rng(asked.seed).permutation(len(ids) // own)[: asked.samples])
    pieces = [np.concatenate([beginning, ids[i * own : (i + 1) * own]]) for i in chosen]
    return np.stack(pieces), len(ids)
