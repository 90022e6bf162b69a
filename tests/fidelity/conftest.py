"""A toy bundle for tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.toy import Toy, build_toy


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one stream, with a prefill graph."""
    return build_toy(tmp_path_factory.mktemp("toy") / "bundle", Toy(chunk_size=4))
