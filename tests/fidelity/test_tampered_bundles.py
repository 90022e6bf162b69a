"""Bundles whose manifest was changed by hand: both runtimes refuse them in one line, or go on with the same tokens.

`test_manifest_agreement` reads manifests alone; here the graphs behind them are loaded and run as well.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sinkrt import Session
from sinkrt.contract import DTYPE_BYTES, MANIFEST_NAME
from sinkrt.contract.constants import ALL_KINDS
from sinkrt.errors import SinkError

from tests.cpp.build import CppRuntime
from tests.cpp.probe import Probe, ProbeError
from tests.runtime.layout_bundles import build_layout, kinds
from tests.runtime.toy import toy_ids
from tests.support import run_cli

KINDS = kinds()
DAILY = ("latent", "mixed", "none")
"""Kinds whose every field is changed in the daily run as well: the others take as long."""
STEPS = 9
FILES = ("decode.onnx", "prefill.onnx", "tokenizer.json", MANIFEST_NAME)

Place = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a runtime did. refused: what it named as wrong; None: nothing. ids: of each stream. state: as saved."""

    refused: str | None
    ids: list[list[int]]
    state: bytes


@pytest.fixture
def probe(cpp_runtime: CppRuntime) -> Probe:
    return Probe(cpp_runtime.programs / "libprobe.so")


@pytest.mark.parametrize(
    "kind", [kind if kind in DAILY else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_both_runtimes_agree_on_every_changed_field(kind: str, probe: Probe, tmp_path: Path) -> None:
    """What is taken changes no token: it describes, or says where an answer ends."""
    bundle = build_layout(tmp_path / "bundle", KINDS[kind])
    raw = read(bundle)
    good = both(bundle, raw, probe, tmp_path, "nothing")
    assert good.refused is None
    taken = 0
    for what, changed in mutations(raw):
        found = both(bundle, changed, probe, tmp_path, what)
        taken += found.refused is None
        assert found.refused is not None or found.ids == good.ids, what
    assert 30 < taken < 120


def changing(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(raw: Any) -> None:
        parent(raw, path)[path[-1]] = to

    return change


def both_named(raw: Any) -> None:
    """Two states under one name."""
    raw["states"][1]["input"], raw["states"][1]["output"] = (raw["states"][0][name] for name in ("input", "output"))


def later_layer(raw: Any) -> None:
    """A cache of a layer that the graph's is not, its states renamed with it."""
    raw["model"]["num_layers"] += 1
    raw["attention"][0]["layer"] = last = raw["model"]["num_layers"] - 1
    for state in raw["states"]:
        kind, _, layer = state["input"].partition(".")
        if layer == "1" and kind.startswith(("sink", "window")):
            state |= {"layer": last, "input": f"{kind}.{last}", "output": f"{kind}.{last}.next"}


HOSTILE: list[tuple[str, Callable[[Any], None], str]] = [
    ("latent", changing("attention", 0, "value_dim", to=7), "layout in decode.onnx"),
    ("latent", changing("attention", 0, "value_dim", to=13), "attention.value_dim"),
    ("latent", changing("attention", 0, "num_q_heads", to=3), "layout in decode.onnx"),
    ("latent", changing("attention", 0, "key_dim", to=14), "state 'window_k.1'"),
    ("latent", changing("attention", 0, "latent", to=False), "states"),
    ("latent", changing("model", "head_dim", to=16), "layout in decode.onnx"),
    ("latent", changing("schema_version", to=6), "attention"),
    ("uneven", changing("attention", 1, "num_q_heads", to=4), "layout in decode.onnx"),
    ("uneven", changing("attention", 1, "value_dim", to=8), "state 'window_v.1'"),
    ("uneven", changing("attention", 2, "layer", to=0), "attention[2]"),
    ("uneven", changing("attention", to=None), "state 'window_k.1'"),
    ("uneven", changing("schema_version", to=6), "attention"),
    ("uneven", both_named, "state 'sink_k.0'"),
    ("mixed", later_layer, "graph input 'sink_k.2'"),
    ("mixed", changing("states", -1, "shape", to=[2, 6]), "graph input 'conv.1'"),
    ("mixed", changing("states", -1, "dtype", to="float16"), "graph input 'conv.1'"),
    ("recurrent", changing("states", -1, "kind", to="conv"), "states"),
    ("recurrent", changing("states", -1, "shape", to=[2, 2, 3]), "graph input 'recurrent.1'"),
    ("recurrent", changing("attention", to=[]), "attention"),
    ("uniform", changing("attention", to=[]), "attention"),
    ("uniform", changing("stream", "window_size", to=7), "tokens of state 'window_k.0'"),
    ("uniform", changing("stream", "num_sink_tokens", to=1), "state 'sink_k.0'"),
    ("none", changing("stream", "window_size", to=7), "layout in decode.onnx"),
    ("none", changing("stream", "num_sink_tokens", to=0), "layout in decode.onnx"),
    ("none", changing("states", 0, "shape", to=[2, 2**40]), "memory"),
    ("none", changing("states", 0, "shape", to=[2, 2**20]), "graph input 'conv.0'"),
    ("none", changing("attention", to=None), "attention"),
    ("none", changing("states", 0, "kind", to="window_k"), "attention[0]"),
    ("none", changing("schema_version", to=6), "attention"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_manifests_are_refused(number: int, probe: Probe, tmp_path: Path) -> None:
    kind, change, named_first = HOSTILE[number]
    bundle = build_layout(tmp_path / "bundle", KINDS[kind])
    raw = read(bundle)
    change(raw)
    assert both(bundle, raw, probe, tmp_path, f"{number}").refused == named_first


def test_programs_end_with_one_line_and_code_2(cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    bundle = build_layout(tmp_path / "bundle", kinds(batch=1)["latent"])
    raw = read(bundle)
    raw["attention"][0]["value_dim"] = 7
    (bundle / MANIFEST_NAME).write_text(json.dumps(raw), encoding="utf-8")
    python = run_cli("run", bundle, "--prompt", "ab")
    cpp = cpp_runtime.run(cpp_runtime.generate, bundle, "--prompt", "ab")
    assert (python.code, cpp.returncode) == (2, 2)
    for text in (python.err, cpp.stderr):
        assert "layout in decode.onnx: received" in text and text.count("\n") == 1


def test_states_of_other_kinds_and_cut_ones_are_refused(probe: Probe, tmp_path: Path) -> None:
    bundles = {kind: build_layout(tmp_path / kind, KINDS[kind]) for kind in KINDS}
    saved = {kind: tmp_path / f"{kind}.state" for kind in KINDS}
    for kind, bundle in bundles.items():
        with Session.load(bundle, threads=1) as session:
            session.prefill(toy_ids(2, 6))
            session.save_state(saved[kind])
    for kind, bundle in bundles.items():
        whole = saved[kind].read_bytes()
        with Session.load(bundle, threads=1) as session:
            session.load_state(saved[kind])
            probe.load_state(bundle, saved[kind])
            for other in KINDS:
                if other != kind:
                    message = both_refuse(session, probe, bundle, saved[other])
                    assert message.startswith(("state file", "state '")), message
            for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
                (tmp_path / "cut").write_bytes(whole[:size])
                assert both_refuse(session, probe, bundle, tmp_path / "cut") == "state file"
            (tmp_path / "long").write_bytes(whole + b"\0")
            assert both_refuse(session, probe, bundle, tmp_path / "long") == "state file"


def both_refuse(session: Session, probe: Probe, bundle: Path, state: Path) -> str:
    """Load a state in both runtimes. Returns: what both named as wrong."""
    with pytest.raises(SinkError) as python:
        session.load_state(state)
    with pytest.raises(ProbeError) as cpp:
        probe.load_state(bundle, state)
    assert str(python.value).isprintable() and "\n" not in str(cpp.value)
    assert named(python.value) == named(cpp.value)
    return named(python.value)


def both(bundle: Path, raw: Any, probe: Probe, folder: Path, what: str) -> Outcome:
    """Run the bundle under another manifest in both runtimes. Returns: what both did."""
    (bundle / MANIFEST_NAME).write_text(json.dumps(raw), encoding="utf-8")
    prompt = toy_ids(2, 6)
    python, cpp = run_python(bundle, prompt, folder / "python"), run_cpp(bundle, prompt, probe, folder / "cpp")
    assert (python.refused, python.ids) == (cpp.refused, cpp.ids), what
    assert python.state == cpp.state, what
    return python


def run_python(bundle: Path, prompt: np.ndarray, state: Path) -> Outcome:
    ids: list[list[int]] = []
    try:
        with Session.load(bundle, threads=1) as session:
            logits = session.prefill(prompt)
            for _ in range(STEPS):
                ids.append(logits.argmax(axis=1).tolist())
                logits = session.step(ids[-1])
            session.save_state(state)
    except SinkError as error:
        assert str(error).isprintable()
        return Outcome(named(error), [], b"")
    return Outcome(None, [list(row) for row in zip(*ids, strict=True)], state.read_bytes())


def run_cpp(bundle: Path, prompt: np.ndarray, probe: Probe, state: Path) -> Outcome:
    try:
        ids = probe.steps(bundle, prompt, STEPS, state, ignore_eos=True)
    except ProbeError as error:
        assert "\n" not in str(error)
        return Outcome(named(error), [], b"")
    return Outcome(None, ids, state.read_bytes())


def named(error: Exception) -> str:
    return str(error).partition(": received")[0]


def read(bundle: Path) -> Any:
    return json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))


def mutations(raw: Any) -> Iterator[tuple[str, Any]]:
    """Change every value of a manifest, one at a time, to others of its type that a careful hand would choose."""
    names = [state[key] for state in raw["states"] for key in ("input", "output")]
    for path, value in places(raw):
        for other in others(path[-1], value, names):
            if other == value and type(other) is type(value):
                continue
            changed = copy.deepcopy(raw)
            parent(changed, path)[path[-1]] = other
            yield f"{path}: {value!r} -> {other!r}"[:200], changed
        changed = copy.deepcopy(raw)
        del parent(changed, path)[path[-1]]
        yield f"no {path}", changed


def others(key: Any, value: Any, names: list[str]) -> list[Any]:
    """Values for the place of another. key: last of its path. names: of states."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value, 0]
    if isinstance(value, str):
        words = {"dtype": tuple(DTYPE_BYTES), "kind": ALL_KINDS, "file": FILES, "input": names, "output": names}
        return [*words.get(key, ()), value + "x"]
    if isinstance(value, list):
        return [value[1:], [*value, *value[:1]], value[::-1], []]
    return [] if isinstance(value, dict) else [1, "3", []]


def places(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def parent(value: Any, path: Place) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value
