"""What users lean on is as it was: help texts, documented signatures, a tiny bundle's bytes and fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden import make_outside
from tests.golden.make_outside import FOLDER

HELP = make_outside.help_texts()


def test_every_command_has_its_golden() -> None:
    """And none is left of a command that is gone."""
    assert set(HELP) == {path.name for path in (FOLDER / "help").iterdir()}


@pytest.mark.parametrize("name", HELP)
def test_help(name: str) -> None:
    """The text is the golden's, word for word."""
    assert HELP[name] == (FOLDER / "help" / name).read_text()


def test_signatures() -> None:
    """Documented modules have the public names, signatures and fields that they had."""
    assert make_outside.signatures() == json.loads((FOLDER / "signatures.json").read_text())


def test_bundle_bytes(tmp_path: Path) -> None:
    """A tiny export has the same files to the byte, and the fingerprint that older states carry."""
    found = json.loads(json.dumps(make_outside.bundle_facts(tmp_path)))
    assert found == json.loads((FOLDER / "bundle.json").read_text())
