"""Every causal LM class of the installed transformers is exported exactly, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.families.found import Found
from tests.families.outcome import EXACT, FAULT, NOT_BUILT, outcome_of
from tests.families.shrink import OVERRIDES, model_types
from tests.support import nightly_but

DAILY = frozenset(
    (
        "arcee",
        "bart",
        "ernie4_5_moe",
        "exaone4",
        "glm4",
        "gpt_neo",
        "helium",
        "jais2",
        "mamba",
        "nemotron",
        "olmo3",
        "vaultgemma",
    )
)
"""Families of the usual run; the others are of ``make test-families`` and ``make test-nightly``."""


@pytest.mark.parametrize("model_type", nightly_but(DAILY, model_types()))
def test_a_family_is_exact_or_refused(model_type: str, tmp_path: Path) -> None:
    outcome = outcome_of(model_type, tmp_path)
    assert outcome.state != FAULT, outcome.reason
    if outcome.state == NOT_BUILT:
        assert "not_built" in OVERRIDES.get(model_type, {}), f"tests/families/overrides.json: {outcome.reason}"
    if Found.read().families.get(model_type, outcome).state == EXACT:  # and in newer releases of transformers
        assert outcome.state == EXACT, outcome.reason


def test_what_was_found_is_of_families_that_there_are() -> None:
    found = Found.read()
    if found.transformers == transformers.__version__:
        assert sorted(found.families) == model_types()
