"""Families with shared layers, latent rows and recurrent states in C++: tokens and states as in Python, idle or not.

`test_uneven_bundles` asks more of fewer of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sinkrt import Session
from sinkrt.contract import MANIFEST_NAME

from tests.cpp.probe import Probe
from tests.exporter.tiny_models import tiny_model
from tests.support import export_model, random_ids

BATCH, SINKS, WINDOW, CHUNK = 3, 2, 7, 4
COUNT = 6 * (SINKS + WINDOW)
FAMILIES = {
    "gemma4_text": "layers that read an earlier layer's cache",
    "lfm2": "short convolutions",
    "gemma3n_text": "the same layers and inputs by layer",
    "deepseek_v3": "latent rows",
    "mamba2": "no attention",
    "falcon_h1": "state-space layers beside attention",
    "jamba": "state-space layers in turns with attention",
}
DAILY = ("gemma4_text", "lfm2")
"""The C++ runtime knows kinds of states, no families: the others are for the long run."""


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_same_tokens_and_states(name: str, probe: Probe, tmp_path: Path) -> None:
    bundle, prompt = tmp_path / "bundle", random_ids(BATCH, 21)
    export_model(tiny_model(name), bundle, num_sink_tokens=SINKS, window_size=WINDOW, batch=BATCH, chunk_size=CHUNK)
    with Session.load(bundle, threads=1) as session:
        wanted = answers(session, prompt, ends=set())
        assert probe.steps(bundle, prompt, COUNT, tmp_path / "cpp", ignore_eos=True) == wanted
        session.save_state(tmp_path / "python")
        assert (tmp_path / "cpp").read_bytes() == (tmp_path / "python").read_bytes()
        session.load_state(tmp_path / "cpp")
        probe.load_state(bundle, tmp_path / "python")

        # Streams that end one after the other stand still while the rest go on.
        session.reset()
        ends = {wanted[0][18], wanted[1][5], wanted[2][11]}
        stopped = answers(session, prompt, ends)
        assert session.position.tolist() == [prompt.shape[1] + len(row) for row in stopped]
    raw = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
    raw["model"]["eos_token_ids"] = sorted(ends)
    (bundle / MANIFEST_NAME).write_text(json.dumps(raw), encoding="utf-8")
    assert probe.steps(bundle, prompt, COUNT, tmp_path / "cpp", ignore_eos=False) == stopped


def answers(session: Session, prompt: np.ndarray, ends: set[int]) -> list[list[int]]:
    """The most likely ids of each stream after a prompt, up to COUNT or the first of `ends`."""
    session.prefill(prompt)
    rows: list[list[int]] = [[] for _ in range(session.batch)]
    active = list(range(session.batch))
    for _ in range(COUNT):
        best = session.logits.argmax(axis=1)
        active = [stream for stream in active if int(best[stream]) not in ends]
        if not active:
            break
        for stream in active:
            rows[stream].append(int(best[stream]))
        session.step(best[active], streams=active)
    return rows
