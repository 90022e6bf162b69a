"""`memory.py` and `steady_memory.py` on the toy bundle. No test depends on how much memory anything takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sinkrt.contract import load_manifest

from tests.runtime.toy import Toy, build_toy

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("memory") / "toy", Toy(batch=2, chunk_size=4))


def run(script: str, *arguments: object) -> tuple[dict[str, Any], str]:
    """The record that a script writes, and what it prints. The last argument is the record's file."""
    command = [sys.executable, SCRIPTS / script, *arguments[:-1], "--json", arguments[-1]]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(Path(str(arguments[-1])).read_text(encoding="utf-8")), done.stdout


def test_memory_of_fresh_processes(bundle: Path, tmp_path: Path) -> None:
    """What is resident grows from imports to use; ratios are of what is beyond the imports."""
    result, shown = run("memory.py", bundle, "--threads=1", "--steps=3", tmp_path / "m.json")
    each, empty = result["bundles"]["toy"], result["empty"]
    assert 0 < empty["libraries"] < empty["peak"]
    assert empty["peak"] < each["loaded"]["peak"] <= each["used"]["peak"]
    manifest = load_manifest(bundle)
    whole = (manifest.weights_bytes + manifest.state_bytes) / 1e6
    assert each["weights_mb"] + each["states_mb"] == pytest.approx(whole)
    assert each["ratios"]["peak"] == pytest.approx((each["used"]["peak"] - empty["peak"]) / whole)
    assert each["ratios"]["without_libraries"] < each["ratios"]["peak"]
    assert each["load_s"] > 0
    assert "| toy" in shown and "Python and libraries alone" in shown


def test_memory_over_many_steps(bundle: Path, tmp_path: Path) -> None:
    """A line after the warm-up, and one for every 50 steps; prompts of one to twelve tokens in between."""
    options = ("--steps=200", "--every=50", "--prompt-every=20", "--warm-up=30")
    result, shown = run("steady_memory.py", bundle, *options, tmp_path / "s.json")
    points = result["points"]
    assert [point["steps"] for point in points] == [30, 50, 100, 150, 200]
    for point in points:
        prompts = point["steps"] // 20
        assert prompts <= point["tokens"] - point["steps"] <= 12 * prompts
        assert 0 < point["allocated_mb"] < point["resident_mb"]
    assert shown.count("\n|") == 2 + len(points)


@pytest.mark.parametrize("options", [("--steps=0",), ("--warm-up=300", "--steps=200")])
def test_numbers_that_make_no_sense(options: tuple[str, ...], bundle: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "steady_memory.py"), str(bundle), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "must be" in done.stderr
