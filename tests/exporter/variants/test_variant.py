"""`AttentionVariant`: the three changes of attention as one value, from a config and from a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from sinkexport.config import ExportConfig
from sinkexport.variants.head_windows import HeadWindowFile, WindowedModel
from sinkexport.variants.sink_tuning import SinkTuningFile, TunedModel
from sinkexport.variants.variant import PLAIN, AttentionVariant
from sinkrt import UsageError

from tests.exporter.tiny_models import tiny_model
from tests.support import export_model

WINDOWS = ((9, 4), (5, 9))


def config() -> ExportConfig:
    name = type(tiny_model("llama")).__name__
    windowed = WindowedModel(name="tiny", architecture=name, num_layers=2, num_kv_heads=2)
    tuned = TunedModel(name="tiny", architecture=name, num_layers=2, num_q_heads=6)
    return ExportConfig(
        num_sink_tokens=3,
        window_size=9,
        chunk_size=1,
        sink_tuning=SinkTuningFile(model=tuned, first_token_scale=((0.5,) * 6, (2.0,) * 6)),
        budgets=HeadWindowFile(model=windowed, windows=WINDOWS),
    )


def test_the_variant_of_a_bundle_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    asked = config()
    manifest = export_model(tiny_model("llama"), tmp_path / "b", asked, check=False).manifest
    found = AttentionVariant.of_bundle(tmp_path / "b", manifest)
    assert found == asked.variant
    assert not found.is_plain
    assert (found.windows(0, 2, 9), found.shortest_window(9), found.act) == ((9, 4), 4, None)


def test_nothing_is_changed_by_default() -> None:
    assert ExportConfig().variant == PLAIN
    assert PLAIN.is_plain
    assert (PLAIN.windows(1, 3, 20), PLAIN.shortest_window(20)) == ((20, 20, 20), 20)
    PLAIN.check_window_size(20)


def test_the_window_is_the_longest_per_head_window() -> None:
    variant = AttentionVariant(head_windows=WINDOWS)
    variant.check_window_size(9)
    with pytest.raises(UsageError, match="pass --window 9"):
        variant.check_window_size(10)
