"""Refusals of families say what the model does, not what this program did."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.outcome import REFUSED, outcome_of


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bart", "a table of positions, which is read at the length of the cache"),
        ("roberta", "a table of positions"),
        ("biogpt", "a table of positions"),
        ("cpmant", "does not use transformers' attention interface"),
        ("mllama", "a MllamaTextConfig, which transformers loads as no causal language model"),
    ],
)
def test_the_reason_is_of_the_model(model_type: str, reason: str, tmp_path: Path) -> None:
    outcome = outcome_of(model_type, tmp_path)
    assert outcome.state == REFUSED
    assert reason in outcome.reason
