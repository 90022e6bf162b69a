"""`sinkexport export` of a tiny model with a file that it must refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from click.testing import CliRunner
from sinkexport.cli import cli
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model


def assert_export_refuses(option: str, file: Path, options: Mapping[str, str], expected: str, folder: Path) -> None:
    """In one line that has `expected` in it, with nothing left behind. options: MODEL, of tiny_models, and others."""
    options = dict(options)
    tiny_model(options.pop("MODEL", "llama")).save_pretrained(folder / "model")
    words = [word for pair in options.items() for word in pair]
    result = CliRunner().invoke(
        cli, ["export", str(folder / "model"), "-o", str(folder / "out"), "--window", "9", option, str(file), *words]
    )
    assert isinstance(result.exception, UsageError)
    assert expected in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (folder / "out").exists()
