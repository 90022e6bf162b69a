"""Weights that graphs share: what the reader of graphs finds, what is mapped, and what is left to ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from sinkrt import BundleError, Session
from sinkrt.backends.external_tensors import ExternalTensor, external_tensors
from sinkrt.backends.ort_graph import open_graph
from sinkrt.backends.weights import SharedWeights
from sinkrt.contract import load_manifest

from tests.mappings import mappings_of
from tests.runtime.toy import Toy, build_toy

CPU = ["CPUExecutionProvider"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build_toy(tmp_path / "bundle")


def shared(bundle: Path) -> SharedWeights:
    return SharedWeights(bundle, load_manifest(bundle))


def logits(session: ort.InferenceSession) -> np.ndarray:
    """Logits of one step from an empty cache."""
    feeds: dict[str, Any] = {"ids": np.array([[5]]), "position": np.array([0])}
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros(value.shape, np.float32)
    out: np.ndarray = session.run(["logits"], feeds)[0]
    return out


def external(**fields: Any) -> onnx.TensorProto:
    """An initializer of one row that lies in another file. fields: entries of external_data."""
    tensor = TensorProto(name="x", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_of(*tensors: onnx.TensorProto) -> bytes:
    return helper.make_model(helper.make_graph([], "g", [], [], list(tensors))).SerializeToString()


# --- the reader ------------------------------------------------------------------------------------------------------


def test_the_reader_finds_what_onnx_finds(bundle: Path) -> None:
    wanted = []
    for tensor in onnx.load(bundle / "decode.onnx", load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            place = entries["location"], int(entries["offset"]), int(entries["length"])
            wanted.append(ExternalTensor(tensor.name, tensor.data_type, tuple(tensor.dims), *place))
    assert external_tensors((bundle / "decode.onnx").read_bytes()) == wanted
    assert len(wanted) == 5


def test_offset_and_length_may_be_left_out() -> None:
    scalar = TensorProto(name="s", data_type=TensorProto.INT64, int64_data=[1])
    found = external_tensors(model_of(scalar, external(location="w", checksum="abc")))
    assert found == [ExternalTensor("x", TensorProto.FLOAT, (3,), "w", 0, None)]


@pytest.mark.parametrize("fields", [{"offset": "x"}, {"length": "1.5"}, {"offset": ""}])
def test_numbers_that_are_none(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        external_tensors(model_of(external(location="w", **fields)))


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_what_is_no_graph_is_refused(noise: bytes, place: int, byte: int) -> None:
    """Any bytes, the beginning of a graph, and a graph with one byte changed: read or refused."""
    good = model_of(external(location="w", offset=64, length=12), external(location="v"))
    changed = bytearray(good)
    changed[place % len(good)] = byte
    for data in (noise, good[: place % len(good)], bytes(changed)):
        with contextlib.suppress(ValueError):
            external_tensors(data)


# --- what is mapped --------------------------------------------------------------------------------------------------


def test_one_mapping_for_all_graphs(bundle: Path) -> None:
    """It ends with the weights, which the sessions refer to."""
    weights = shared(bundle)
    sessions = [open_graph(bundle / "decode.onnx", 1, CPU, repack=False, weights=weights) for _ in range(3)]
    assert mappings_of(bundle / "weights.bin") == 1
    wanted = logits(open_graph(bundle / "decode.onnx", 1, CPU))
    for session in sessions:
        np.testing.assert_allclose(logits(session), wanted, atol=1e-5)
    sessions.clear()
    del session, weights
    assert mappings_of(bundle / "weights.bin") == 0


def test_a_file_that_is_replaced_stays_as_it_was(bundle: Path, tmp_path: Path) -> None:
    weights = shared(bundle)
    session = open_graph(bundle / "decode.onnx", 1, CPU, repack=False, weights=weights)
    before = logits(session)
    other = build_toy(tmp_path / "other", Toy(seed=1)) / "weights.bin"
    other.replace(bundle / "weights.bin")
    np.testing.assert_array_equal(logits(session), before)
    assert not np.array_equal(logits(open_graph(bundle / "decode.onnx", 1, CPU)), before)


def test_files_that_cannot_be_written(bundle: Path) -> None:
    for path in (*bundle.iterdir(), bundle):
        path.chmod(0o555 if path.is_dir() else 0o444)
    session = open_graph(bundle / "decode.onnx", 1, CPU, repack=False, weights=shared(bundle))
    assert np.isfinite(logits(session)).all()
    assert mappings_of(bundle / "weights.bin") == 1
    bundle.chmod(0o755)


@pytest.mark.parametrize("how", ["short", "empty", "missing", "folder"])
def test_weights_that_are_not_there_are_onnx_runtimes_to_refuse(how: str, bundle: Path) -> None:
    path, weights = bundle / "weights.bin", shared(bundle)
    if how in ("short", "empty"):
        os.truncate(path, 100 if how == "short" else 0)
    else:
        path.unlink()
    if how == "folder":
        path.mkdir()
    with pytest.raises(BundleError, match=r"decode\.onnx: received a graph that ONNX Runtime refuses"):
        open_graph(bundle / "decode.onnx", 1, CPU, weights=weights)


def changed_entry(model: onnx.ModelProto, key: str, value: object) -> None:
    """One entry of each tensor that lies outside the graph."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = str(value)


@pytest.mark.parametrize(("key", "value"), [("offset", 2**40), ("offset", -64), ("length", 7), ("location", "../b/w")])
def test_places_that_do_not_fit_are_onnx_runtimes_to_refuse(key: str, value: object, bundle: Path) -> None:
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    changed_entry(model, key, value)
    (bundle / "decode.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="a graph that ONNX Runtime refuses"):
        open_graph(bundle / "decode.onnx", 1, CPU, weights=shared(bundle))
    assert mappings_of(bundle / "weights.bin") == 0


def test_files_that_the_manifest_does_not_list_are_not_mapped(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    listed = {name: facts for name, facts in manifest.files.items() if name != "weights.bin"}
    weights = SharedWeights(bundle, dataclasses.replace(manifest, files=listed))
    options = ort.SessionOptions()
    weights.give("decode.onnx", options)
    assert mappings_of(bundle / "weights.bin") == 0


def test_graphs_that_cannot_be_read_are_onnx_runtimes_to_refuse(bundle: Path) -> None:
    (bundle / "decode.onnx").write_bytes(b"\xff" * 40)
    for name in ("decode.onnx", "nothing.onnx"):
        with pytest.raises(BundleError, match="a graph that ONNX Runtime refuses"):
            open_graph(bundle / name, 1, CPU, weights=shared(bundle))


def test_an_unreadable_file_is_not_mapped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's permissions would not keep the superuser, who may run these tests, from reading."""
    real = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == "weights.bin":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"weights\.bin"):
        Session.load(bundle)
    shared(bundle).give("decode.onnx", ort.SessionOptions())
    assert mappings_of(bundle / "weights.bin") == 0
