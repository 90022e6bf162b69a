"""`sinkexport export` of a tiny model with a file that it must refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.exporter.tiny_models import tiny_model
from tests.support import run_cli


def assert_export_refuses(option: str, file: Path, options: Mapping[str, str], expected: str, folder: Path) -> None:
    """In one line that has `expected` in it, with nothing left behind. options: MODEL, of tiny_models, and others."""
    options = dict(options)
    tiny_model(options.pop("MODEL", "llama")).save_pretrained(folder / "model")
    words = [word for pair in options.items() for word in pair]
    result = run_cli("export", folder / "model", "-o", folder / "out", "--window", "9", option, file, *words)
    result.refusal(expected)
    assert not (folder / "out").exists()
