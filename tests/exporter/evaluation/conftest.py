"""One tiny model for the tests of a module: itself, as exports take it, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sinkexport.sources import LoadedModel

from tests.exporter.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, None, "tiny")


@pytest.fixture(scope="module")
def model_folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    model.save_pretrained(folder)
    return folder
