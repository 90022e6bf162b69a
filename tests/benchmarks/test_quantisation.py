"""benchmarks/quantisation.py's predictions: by chunks, and kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sinkexport.evaluation import baselines
from sinkexport.sources import LoadedModel
from sinkrt import Session

from tests.exporter.tiny_models import tiny_model
from tests.support import random_ids, refused

GEOMETRY = {"num_sink_tokens": 2, "window_size": 14, "chunk_size": 10}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files import each other as scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def rows(predictor: Any) -> np.ndarray:
    return np.concatenate([prediction.logits.copy() for prediction in predictor.predictions()])


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2"])
@pytest.mark.usefixtures("cpu_library")
def test_chunks_predict_what_steps_predict(family: str, shared_export: Any) -> None:
    from chunk_predictions import chunk_predictor

    path, manifest = (bundle := shared_export(family, target="cpu", **GEOMETRY)).path, bundle.manifest
    if family == "gemma2":  # a softcap follows its output projection
        with refused("--chunks: received a graph whose logits come from"):
            chunk_predictor(path, manifest, random_ids(5), 1)
        return
    ids = random_ids(75)
    with Session.load(path, threads=1) as session:
        want = rows(baselines.bundle(session, ids, ""))
    np.testing.assert_allclose(rows(chunk_predictor(path, manifest, ids, 1)), want, atol=1e-5)
    assert not list(path.glob("tmp*"))


def test_predictions_are_kept(shared_export: Any, tmp_path: Path) -> None:
    from kept_predictions import keep_predictions

    loaded, ids = LoadedModel(tiny_model("llama"), None, "tiny"), random_ids(40)
    stream = shared_export("llama", **GEOMETRY).manifest.stream
    first = rows(keep_predictions(loaded, ids, stream, tmp_path / "kept.npy"))
    want = rows(baselines.sinks_and_window(loaded.model, ids, 2, 14, name="reference"))
    np.testing.assert_array_equal(first, want)
    other = LoadedModel(None, None, "tiny")  # nothing to predict with
    np.testing.assert_array_equal(rows(keep_predictions(other, ids, stream, tmp_path / "kept.npy")), first)
    with refused("--keep: received predictions of"):
        keep_predictions(loaded, ids[:-1], stream, tmp_path / "kept.npy")
