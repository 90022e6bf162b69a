"""The table of docs/fidelity.md names tests that are there."""

from __future__ import annotations

import re

import pytest

from tests.plugins.compiler import ROOT

TABLE = (ROOT / "docs/fidelity.md").read_text("utf-8")
NAMES = sorted(set(re.findall(r"\btest_\w+", TABLE)) - set(re.findall(r"\b(test_\w+)\.py", TABLE)))
SOURCES = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))


@pytest.mark.parametrize("name", NAMES)
def test_every_test_of_the_table_exists(name: str) -> None:
    assert re.search(rf"def {name}\(", SOURCES)
