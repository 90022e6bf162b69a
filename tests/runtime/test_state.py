"""Saved streams: the same bits after loading, nothing half-written, nothing loaded that does not fit."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sinkrt import Session, StateError, UsageError
from sinkrt.contract.constants import STATE_VERSION

from tests.runtime.faults import load_faulty
from tests.runtime.toy import VOCAB_SIZE, Toy, build_toy, toy_ids


def snapshot(session: Session) -> dict[str, np.ndarray]:
    return {"at": session.position, **{name: buffer.copy() for name, buffer in session.buffers.items()}}


@pytest.mark.parametrize("fed", [1, 2, 3, 7, 8, 9, 50])
def test_a_loaded_stream_goes_on_with_the_same_bits(toy_bundle: Path, tmp_path: Path, fed: int) -> None:
    rest = toy_ids(30, seed=2).tolist()
    with Session.load(toy_bundle, threads=1) as session:
        session.prefill(toy_ids(fed).tolist())
        session.save_state(tmp_path / "state")
        want = [session.step([token]).copy() for token in rest]
    with Session.load(toy_bundle, threads=1) as session:
        session.prefill(toy_ids(13, seed=3).tolist())  # leftovers of another stream must not matter
        session.load_state(tmp_path / "state")
        assert session.position[0] == fed
        for token, logits in zip(rest, want, strict=True):
            np.testing.assert_array_equal(session.step([token]), logits)


def test_sampled_text_goes_on_too(toy_bundle: Path, tmp_path: Path) -> None:
    """Draws depend on seed and position, and the penalty's history is in the file."""
    options: dict[str, Any] = {"temperature": 1.2, "repetition_penalty": 1.5, "seed": 11, "ignore_eos": True}

    def tokens(session: Session, prompt: list[int], count: int) -> list[int]:
        fed: list[int] = []
        step = session.step
        session.step = lambda ids: (fed.extend(ids), step(ids))[1]  # type: ignore[method-assign, assignment, return-value]
        list(session.generate(prompt, max_tokens=count, **options))
        del session.step  # type: ignore[method-assign]
        return fed

    with Session.load(toy_bundle, threads=1) as session:
        whole = tokens(session, [1, 2, 3], 30)
    with Session.load(toy_bundle, threads=1) as session:
        first = tokens(session, [1, 2, 3], 11)
        assert first == whole[:11]
    with Session.load(toy_bundle, threads=1) as session:
        session.prefill([1, 2, 3, *first[:10]])
        session.save_state(tmp_path / "state")
    with Session.load(toy_bundle, threads=1) as session:
        session.load_state(tmp_path / "state")
        assert tokens(session, first[10:], 19) == whole[11:]


def test_the_file_is_plain_safetensors(session: Session, tmp_path: Path) -> None:
    session.prefill(toy_ids(20).tolist())
    session.save_state(tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    assert tensors["position"].tolist() == [20]
    assert set(tensors) == {"sink_k.0", "sink_v.0", "window_k.0", "window_v.0", "position", "recent_ids", "logits"}
    for name, buffer in session.buffers.items():
        if name in tensors and name != "position":
            np.testing.assert_array_equal(tensors[name], buffer)
    ring = tensors["recent_ids"][0]
    assert {int(ring[t % 8]) for t in range(12, 20)} == set(toy_ids(20).tolist()[12:])
    with safe_open(tmp_path / "state", framework="numpy") as file:
        assert file.metadata() == {
            "format": "sinkrt-state",
            "version": STATE_VERSION,
            "fingerprint": session.manifest.fingerprint,
        }
    header = int.from_bytes((tmp_path / "state").read_bytes()[:8], "little")
    assert header % 8 == 0, "tensors must be aligned"


def test_the_file_has_the_users_permissions(session: Session, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        session.save_state(tmp_path / "state")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


def test_saving_twice_replaces_and_leaves_nothing_beside(session: Session, tmp_path: Path) -> None:
    session.step([1])
    session.save_state(tmp_path / "state")
    session.step([2])
    session.save_state(tmp_path / "state")
    assert [f.name for f in tmp_path.iterdir()] == ["state"]
    assert load_file(tmp_path / "state")["position"].tolist() == [2]


@pytest.mark.parametrize("target", ["missing/state", ".", ""])
def test_a_path_that_cannot_be_written(session: Session, tmp_path: Path, target: str) -> None:
    with pytest.raises(UsageError, match="state file") as caught:
        session.save_state(tmp_path / target if target else "")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.step([1])
    session.save_state(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    session.step([2])

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        session.save_state(tmp_path / "state")
    assert [f.name for f in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == before


# --- files that must not be loaded -----------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, np.ndarray], dict[str, str]], object]) -> Callable[[Path], None]:
    """Rewrites a state file with changed tensors or metadata."""

    def edit(path: Path) -> None:
        tensors = load_file(path)
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata())
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    return edit


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def lying_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes((2**40).to_bytes(8, "little") + data[8:])


def overlapping_offsets(path: Path) -> None:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["recent_ids"]["data_offsets"] = [0, 64]  # where the position lies
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "state file"),
    "empty": (lambda path: path.write_bytes(b""), "state file"),
    "text": (lambda path: path.write_text("hello"), "state file"),
    "truncated": (truncated, "whole file"),
    "header only": (header_only, "whole file"),
    "a header that lies": (lying_header, "whole file"),
    "overlapping tensors": (overlapping_offsets, "whole file"),
    "another format": (edited(lambda _, m: m.update(format="other")), "format"),
    "no metadata": (edited(lambda _, m: m.clear()), "format"),
    "a newer version": (edited(lambda _, m: m.update(version="3")), "version: received 3"),
    "another bundle": (edited(lambda _, m: m.update(fingerprint="0" * 64)), "fingerprint"),
    "no position": (edited(lambda t, _: t.pop("position")), "state 'position'"),
    "a missing tensor": (edited(lambda t, _: t.pop("window_v.0")), r"state 'window_v\.0'"),
    "one tensor more": (edited(lambda t, _: t.update(extra=np.zeros(1))), "state 'extra'"),
    "another shape": (edited(lambda t, _: t.update({"sink_k.0": np.zeros((1, 2, 3, 8), np.float32)})), "sink_k"),
    "another dtype": (edited(lambda t, _: t.update({"sink_k.0": t["sink_k.0"].astype(np.float16)})), "float16"),
    "a negative position": (edited(lambda t, _: t.update(position=np.array([-1]))), "state 'position': received -1"),
    "a position too far": (edited(lambda t, _: t.update(position=np.array([2**60]))), "state 'position'"),
    "an id too large": (edited(lambda t, _: t["recent_ids"].fill(VOCAB_SIZE)), "state 'recent_ids'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_changes_nothing(session: Session, tmp_path: Path, name: str) -> None:
    spoil, message = BAD[name]
    path = tmp_path / "state"
    session.prefill(toy_ids(5).tolist())
    session.save_state(path)
    spoil(path)
    session.prefill(toy_ids(11, seed=4).tolist())
    before = snapshot(session)
    with pytest.raises(StateError, match=message) as caught:
        session.load_state(path)
    text = str(caught.value)
    assert "\n" not in text and "received" in text and "expected" in text
    for key, value in snapshot(session).items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)


@pytest.mark.parametrize("other", [Toy(seed=1), Toy(window_size=7), Toy(num_sink_tokens=1), Toy(batch=2)], ids=str)
def test_a_state_of_another_bundle(session: Session, tmp_path: Path, other: Toy) -> None:
    session.step([1])
    session.save_state(tmp_path / "state")
    with (
        Session.load(build_toy(tmp_path / "other", other), threads=1) as second,
        pytest.raises(StateError, match="fingerprint"),
    ):
        second.load_state(tmp_path / "state")


def test_an_interrupted_load_leaves_an_empty_stream(toy_bundle: Path, tmp_path: Path) -> None:
    """Between the first tensor and the last there is no stream: position 0 says so."""
    session, backend = load_faulty(toy_bundle)
    session.prefill(toy_ids(20).tolist())
    session.save_state(tmp_path / "state")
    session.reset()
    want = session.prefill([5, 6]).copy()

    class Interrupting:
        def __setitem__(self, _key: object, _value: object) -> None:
            raise KeyboardInterrupt

    backend.states = {**backend.real.states, "window_v.0": Interrupting()}
    with pytest.raises(KeyboardInterrupt):
        session.load_state(tmp_path / "state")
    del backend.states
    assert session.position[0] == 0
    np.testing.assert_array_equal(session.prefill([5, 6]), want)


# --- killed ----------------------------------------------------------------------------------------------------------

ENDLESS = """
    import sys
    from sinkrt import Session
    session = Session.load(sys.argv[1], threads=1)
    logits = session.step([1])
    while True:
        logits = session.step([int(logits[0].argmax())])
        session.save_state(sys.argv[2])
        print(int(session.position[0]), flush=True)
"""


@pytest.mark.parametrize("wait_s", [0.0, 0.013, 0.05])
def test_killed_and_resumed(toy_bundle: Path, tmp_path: Path, wait_s: float) -> None:
    """kill -9 at any moment leaves a whole state, from which the stream goes on as if it had never been cut."""
    state = tmp_path / "state"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ENDLESS), str(toy_bundle), str(state)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    printed = process.stdout.read().split()
    process.wait()
    with Session.load(toy_bundle, threads=1) as session:
        logits = session.step([1])
        want = [1]
        for _ in range(2000):
            want.append(int(logits[0].argmax()))
            logits = session.step(want[-1:])
        session.load_state(state)
        position = int(session.position[0])
        assert position >= int(printed[-1] if printed else 21)
        for token, next_token in zip(want[position : position + 20], want[position + 1 :], strict=False):
            assert int(session.step([token])[0].argmax()) == next_token


def test_a_state_does_not_depend_on_the_size_of_a_chunk(session: Session, tmp_path: Path) -> None:
    session.prefill(toy_ids(20).tolist())
    session.save_state(tmp_path / "state")
    with Session.load(build_toy(tmp_path / "chunks", Toy(chunk_size=5)), threads=1) as second:
        # The toy's prefill graph brings weights of its own; an exported one shares those of the decode graph.
        object.__setattr__(
            second._manifest, "files", {k: v for k, v in second.manifest.files.items() if "prefill.bin" not in k}
        )
        second.load_state(tmp_path / "state")
        np.testing.assert_array_equal(second.step([3]), session.step([3]))
