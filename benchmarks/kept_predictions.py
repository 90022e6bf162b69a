"""A model's predictions of a text in a file, so that many bundles are compared with one run of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sinkexport.evaluation import baselines
from sinkexport.evaluation.perplexity import Ids, Prediction, Predictor
from sinkexport.evaluation.quality import BLOCK_TOKENS
from sinkexport.sources import LoadedModel
from sinkrt.contract import StreamFacts
from sinkrt.errors import UsageError, problem


def keep_predictions(loaded: LoadedModel, ids: Ids, stream: StreamFacts, path: Path) -> Predictor:
    """Predict the tokens of ids [N] in torch in float32, or read what was predicted before.

    path: of float32 [N - 1, vocabulary], as ``.npy``; ``path.json`` says of what.

    Raises: UsageError for a file of another model, text or geometry.
    """
    digest = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
    geometry = (stream.num_sink_tokens, stream.window_size)
    wanted = {"model": loaded.name, "ids": digest, "num_sink_tokens": geometry[0], "window_size": geometry[1]}
    facts = path.with_name(path.name + ".json")
    if not facts.is_file():
        _predict(loaded, ids, geometry, path)
        facts.write_text(json.dumps(wanted) + "\n")
    elif (found := json.loads(facts.read_text())) != wanted:
        raise UsageError(
            problem("--keep", received=f"predictions of {found}", expected=str(wanted), fix="name another file")
        )
    rows = np.load(path, mmap_mode="r")

    def predictions() -> Iterator[Prediction]:
        for start in range(0, len(rows), BLOCK_TOKENS):
            yield Prediction(start + 1, np.asarray(rows[start : start + BLOCK_TOKENS]))

    return Predictor("reference", f"{loaded.name} in torch, float32", len(ids) - 1, predictions)


def _predict(loaded: LoadedModel, ids: Ids, geometry: tuple[int, int], path: Path) -> None:
    shape = (len(ids) - 1, int(loaded.model.config.vocab_size))
    rows = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for part in baselines.sinks_and_window(loaded.model, ids, *geometry, name="reference").predictions():
        rows[part.first_token - 1 :][: len(part.logits)] = part.logits
    rows.flush()
