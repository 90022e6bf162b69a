"""The soak benchmark, for seconds instead of minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.toy import Toy, build_toy

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak_serve.py"


@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_lost_mixed_up_or_kept(tmp_path: Path, batch: int) -> None:
    bundle = build_toy(tmp_path / "bundle", Toy(batch=batch, chunk_size=4))
    result = tmp_path / "soak.json"
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            bundle,
            "--minutes",
            "0.13",
            "--clients",
            "5",
            "--scripts",
            "6",
            "--threads",
            "1",
            "--max-growth-mb",
            "3",
            "--json",
            result,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(result.read_text(encoding="utf-8"))
    assert facts["answers"] > 5  # a busy machine answers few in eight seconds
    assert facts["left"] > 0
    assert facts["refused"] > 0
    assert (facts["errors"], facts["mismatches"], facts["still_at_work"]) == (0, 0, 0)
    assert len(facts["memory_mb"]) > 10
    assert facts["server_tokens"]["answer"] > 50


def test_the_benchmark_notices_a_wrong_answer(tmp_path: Path) -> None:
    """A check of the check: a server that speaks for another bundle must fail."""
    bundle = build_toy(tmp_path / "bundle", Toy(batch=2, chunk_size=4))
    other = build_toy(tmp_path / "other", Toy(batch=2, chunk_size=4, seed=1))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, soak_serve\n"
        "scripts = soak_serve.write_scripts(pathlib.Path(sys.argv[2]), 3, 1)\n"
        "soak_serve.write_scripts = lambda *_: scripts\n"
        "result = soak_serve.soak(pathlib.Path(sys.argv[3]), 0.05, 2, 3, 1)\n"
        "print(result['mismatches'], result['errors'], len(result['problems']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SCRIPT.parent, bundle, other], capture_output=True, text=True, timeout=120
    )
    mismatches, errors, problems = map(int, done.stdout.split())
    assert mismatches > 0, done.stderr
    assert errors == 0
    assert problems > 0
