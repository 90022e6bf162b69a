"""Refusals of families say what the model does, not what this program did."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from sinkexport.families import refusal_of_config

from tests.families.outcome import REFUSED, outcome_of


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bart", "learns a vector for each absolute position"),
        ("roberta", "a vector for each absolute position"),
        ("cpmant", "a learned bias for each distance"),
        ("mllama", "a MllamaTextConfig, which transformers loads as no causal language model"),
    ],
)
def test_the_reason_is_of_the_model(model_type: str, reason: str, tmp_path: Path) -> None:
    outcome = outcome_of(model_type, tmp_path)
    assert outcome.state == REFUSED
    assert reason in outcome.reason


def test_experts_chosen_by_other_tokens_are_named() -> None:
    """Doge MoE's router cuts the logits of all tokens in two, in the middle of the text."""
    config = transformers.DogeConfig(is_moe=True)
    assert refusal_of_config(config) == "chooses the experts of a token by other tokens of the text as well (is_moe)"
    assert refusal_of_config(transformers.DogeConfig()) is None
