"""Bundles that are damaged, incomplete or newer: refused with one line that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sinkrt import BundleError, Session
from sinkrt.contract import SCHEMA_VERSION, Manifest, check_files, load_manifest

from tests.runtime.toy import Toy, build_toy


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build_toy(tmp_path / "bundle")


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the manifest's JSON."""

    def edit(bundle: Path) -> None:
        path = bundle / "manifest.json"
        raw = json.loads(path.read_text(encoding="utf-8"))
        change(raw)
        path.write_text(json.dumps(raw), encoding="utf-8")

    return edit


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_bytes(content)


def flipped(name: str) -> Callable[[Path], None]:
    """Changes one bit in the middle of a file: its size stays."""

    def flip(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)

    return flip


def cut(name: str) -> Callable[[Path], object]:
    return lambda bundle: (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])


def removed(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (removed("manifest.json"), r"manifest\.json: received no readable file"),
    "empty manifest": (written("manifest.json", b""), "invalid JSON"),
    "cut manifest": (written("manifest.json", b'{"schema_version": 1, "fi'), "invalid JSON"),
    "manifest of bytes": (written("manifest.json", b"\xff\xfe\x00"), r"manifest\.json"),
    "manifest of another kind": (written("manifest.json", b"[1, 2]"), "schema_version"),
    "no schema version": (edited(lambda m: m.pop("schema_version")), "schema_version: received None"),
    "schema version of another type": (edited(lambda m: m.update(schema_version="1")), "schema_version: received 1"),
    "newer schema": (edited(lambda m: m.update(schema_version=SCHEMA_VERSION + 1)), "upgrade this runtime"),
    "unknown key": (edited(lambda m: m.update(colour="red")), "unknown key 'colour'"),
    "unknown key inside": (edited(lambda m: m["stream"].update(stride=2)), "unknown key 'stride'"),
    "missing key": (edited(lambda m: m.pop("states")), "no key 'states'"),
    "missing key inside": (edited(lambda m: m["model"].pop("vocab_size")), "no key 'vocab_size'"),
    "wrong type": (edited(lambda m: m["stream"].update(window_size="6")), "window_size: received str '6'"),
    "true for a number": (edited(lambda m: m["stream"].update(batch=True)), "batch: received bool"),
    "window of 0": (edited(lambda m: m["stream"].update(window_size=0)), "window_size: received 0"),
    "sinks below 0": (edited(lambda m: m["stream"].update(num_sink_tokens=-1)), "num_sink_tokens: received -1"),
    "no decode graph": (edited(lambda m: m.update(graphs={})), "graph named 'decode'"),
    "graph file that is not listed": (edited(lambda m: m["files"].pop("decode.onnx")), "graph file"),
    "file outside": (edited(lambda m: m["files"].update({"../x": m["files"]["weights.bin"]})), "file path"),
    "absolute file": (edited(lambda m: m["files"].update({"/etc/x": m["files"]["weights.bin"]})), "file path"),
    "hash of another length": (edited(lambda m: m["files"]["weights.bin"].update(sha256="ab")), "sha256"),
    "missing weights": (removed("weights.bin"), r"weights\.bin: received no such file"),
    "cut weights": (cut("weights.bin"), r"weights\.bin: received \d+ bytes, expected \d+ bytes"),
    "corrupt weights": (flipped("weights.bin"), r"weights\.bin: received sha256"),
    "corrupt graph": (flipped("decode.onnx"), r"decode\.onnx: received sha256"),
    "corrupt tokenizer": (flipped("tokenizer.json"), r"tokenizer\.json: received sha256"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle(bundle: Path, name: str) -> None:
    spoil, message = BROKEN[name]
    spoil(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        Session.load(bundle)
    text = str(caught.value)
    assert "\n" not in text and "received" in text and "expected" in text


@pytest.mark.parametrize("what", ["nothing", "file"])
def test_a_path_that_is_no_bundle(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("x", encoding="utf-8")
    with pytest.raises(BundleError, match="sinkexport export"):
        Session.load(path)


def test_sizes_alone_are_compared_on_demand(bundle: Path) -> None:
    flipped("weights.bin")(bundle)
    Session.load(bundle, verify=False, threads=1).close()
    cut("weights.bin")(bundle)
    with pytest.raises(BundleError, match=r"weights\.bin"):
        Session.load(bundle, verify=False)


def test_other_files_in_the_folder_do_not_matter(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine", encoding="utf-8")
    check_files(bundle, load_manifest(bundle))


def test_a_manifest_survives_a_round_trip(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json() == (bundle / "manifest.json").read_text(encoding="utf-8")
    toy = Toy()
    assert manifest.state_bytes == 2 * 4 * toy.num_kv_heads * toy.head_dim * toy.capacity


def test_bundles_of_the_first_schema_are_read(bundle: Path) -> None:
    edited(lambda m: (m.pop("quantization"), m.update(schema_version=1)))(bundle)
    manifest = load_manifest(bundle)
    assert (manifest.schema_version, manifest.quantization) == (1, None)


def test_a_quantised_bundle_says_how(bundle: Path) -> None:
    facts = {
        "recipe": "mine",
        "weights": "int8",
        "activations": "static",
        "kv": "fp",
        "calibration_sha256": None,
        "thresholds": {"perplexity_increase": 1},
    }
    edited(lambda m: m.update(quantization=facts))(bundle)
    found = load_manifest(bundle).quantization
    assert found is not None
    assert (found.recipe, found.thresholds) == ("mine", {"perplexity_increase": 1.0})
    edited(lambda m: m.update(quantization={**facts, "weights": "int3"}))(bundle)
    with pytest.raises(BundleError, match=r"quantization\.weights: received int3, expected float \| int8 \| int4"):
        load_manifest(bundle)


def test_the_fingerprint_is_that_of_weights_and_geometry(bundle: Path, tmp_path: Path) -> None:
    own = load_manifest(bundle).fingerprint
    assert load_manifest(build_toy(tmp_path / "same")).fingerprint == own
    assert load_manifest(build_toy(tmp_path / "mute", tokenizer=False)).fingerprint == own
    assert load_manifest(build_toy(tmp_path / "weights", Toy(seed=1))).fingerprint != own
    assert load_manifest(build_toy(tmp_path / "window", Toy(window_size=7))).fingerprint != own
