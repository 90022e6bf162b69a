"""The generated parts of the docs are what the code says; a stale one is found."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.docs.pages import ROOT
from tools import generate_docs


def test_nothing_is_stale() -> None:
    """The check of `make lint`."""
    command = [sys.executable, ROOT / "tools/generate_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_part_is_replaced_and_the_rest_stays() -> None:
    """What stands around a part belongs to people."""
    text = "before\n<!-- generated: x -->\nold\n<!-- end of x -->\nafter\n"
    want = "before\n<!-- generated: x -->\n\nnew\n\n<!-- end of x -->\nafter\n"
    assert generate_docs.updated(text, "x", "new\n") == want
    assert generate_docs.updated(want, "x", "new") == want
    with pytest.raises(SystemExit, match="generated: y"):
        generate_docs.updated(text, "y", "new")


def test_every_part_says_something() -> None:
    """Each command, each family, each class of the manifest and each recipe is in its part."""
    assert "## serve" in generate_docs.commands()
    assert "| `llama` |" in generate_docs.family_table()
    assert "## TensorSpec" in generate_docs.manifest() and "`schema_version`" in generate_docs.manifest()
    assert "`int8-weights`" in generate_docs.recipes()
