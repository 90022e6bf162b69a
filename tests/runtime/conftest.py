"""One toy bundle for the tests that only read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sinkrt import Session

from tests.runtime.toy import build_toy


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the default `Toy`. Tests that change files make their own."""
    return build_toy(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def session(toy_bundle: Path) -> Iterator[Session]:
    """A fresh session on `toy_bundle`."""
    with Session.load(toy_bundle, threads=1) as session:
        yield session
