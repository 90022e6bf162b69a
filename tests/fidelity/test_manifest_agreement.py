"""Every value of a manifest, replaced by odd ones: Python and C++ take the same, and refuse the rest in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sinkrt import BundleError
from sinkrt.contract import MANIFEST_NAME, Manifest

from tests.cpp.build import CppRuntime
from tests.cpp.probe import Probe, ProbeError
from tests.runtime.layouts import CacheSizes, Recurrent, cache, layout
from tests.runtime.toy import Toy, build_toy

SHA256 = "a" * 64
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    1.0,
    1.5,
    1e308,
    float("inf"),
    float("nan"),
    2**53,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**400,
    "",
    "a",
    "../a",
    "a\\b",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "ids",
    "logits",
    "float16",
    "int8",
    "a" * 9000,
    [],
    {},
    [1],
    [0, 0],
    [[True]],
    [1] * 9,
    [2**40, 2**40],
    {"a": 1},
]
Place = tuple[Any, ...]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One that has every field."""
    bundle = build_toy(tmp_path_factory.mktemp("toy") / "bundle", Toy(batch=2, chunk_size=4))
    out: dict[str, Any] = json.loads((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
    layers, heads = out["model"]["num_layers"], out["model"]["num_q_heads"]
    out["sink_tuning"] = {
        "sha256": SHA256,
        "first_token_scale": [[1.0] * heads] * layers,
        "act": {"alpha": 1.5, "beta": 0.5, "min_queries": 3, "heads": [[True] * heads] * layers},
    }
    out["head_windows"] = [
        {"layer": 0, "kv_heads": list(range(out["model"]["num_kv_heads"])), "window_size": out["stream"]["window_size"]}
    ]
    out["affine_attention"] = {"sha256": SHA256, "file": "decode.onnx", "has_inputs": False, "heads": [[0, 1]] * layers}
    out["quantization"] = {
        "recipe": "x",
        "weights": "int8",
        "activations": "float",
        "kv": "fp",
        "calibration_sha256": SHA256,
        "thresholds": {"kl_divergence": 1},
    }
    out["engines"] = {
        "decode": {
            "file": "engines/x",
            "bytes": 4,
            "sha256": SHA256,
            "graph_sha256": SHA256,
            "flavour": "TensorRT",
            "version": "10",
            "plugin_abi": None,
            "gpu": None,
            "compute_capability": "9.0",
            "precision": "float32",
        }
    }
    return out


@pytest.fixture
def probe(cpp_runtime: CppRuntime) -> Probe:
    return Probe(cpp_runtime.programs / "libprobe.so")


def test_both_runtimes_take_the_same(manifest: dict[str, Any], probe: Probe, tmp_path: Path) -> None:
    assert _compare(_mutations(manifest), probe, tmp_path) > 100


def test_both_runtimes_take_the_same_sizes_of_caches(probe: Probe, tmp_path: Path) -> None:
    """`attention` excludes what `manifest` has, so it has a manifest of its own."""
    sizes = cache(1, heads=(4, 1), dims=(6, 4), latent=True)
    good = layout([CacheSizes(cache(0, 1)), CacheSizes(sizes)], [Recurrent(0, 1, 2)])
    raw = json.loads(good.to_json())
    changes = ((what, text) for what, text in _mutations(raw) if what.startswith(("('attention", "no ('attention")))
    assert _compare(changes, probe, tmp_path) > 10


def _compare(mutations: Iterable[tuple[str, bytes]], probe: Probe, tmp_path: Path) -> int:
    """Read each text in both runtimes. Returns: how many were taken."""
    accepted = 0
    for number, (what, text) in enumerate(mutations):
        found = _python(text)
        if number % 3 == 0 or found.startswith("taken"):  # the others for Python alone: it is a matter of time
            assert _cpp(text, probe, tmp_path).partition(":")[0] == found.partition(":")[0], (what, found)
        if found.startswith("taken"):
            accepted += 1
            assert probe.manifest(tmp_path) == Manifest.from_json(text.decode()).to_json(), what
    return accepted


def test_numbers_are_written_as_python_writes_them(manifest: dict[str, Any], probe: Probe, tmp_path: Path) -> None:
    """The engine builder writes a manifest that Python has written: a number that it does not touch stays as it is."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**64, 3_000, dtype=np.uint64).view(np.float64)
    values = [float(value) for value in bits if np.isfinite(value)]
    values += [float(np.float32(value)) for value in random.standard_normal(500)]
    values += [sign * base * 10.0**power for sign in (1, -1) for base in (1, 1.5, 9.999) for power in range(-8, 20)]
    values += [0.0, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1, 1 / 3, 2.0**53, 1e22, 1e23]
    changed = copy.deepcopy(manifest)
    changed["quantization"]["thresholds"] = {f"{i}": value for i, value in enumerate(values)}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(changed))
    assert probe.manifest(tmp_path) == Manifest.from_json(json.dumps(changed)).to_json()


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"toy"', b'"\\ud800"'),
        (b'"toy"', b'"\\ud83d\\ude00"'),
        (b'"toy"', b'"\\udc00\\ud800"'),
        (b'"toy"', b'"\x01"'),
        (b'"toy"', b'"\\u0000"'),
        (b'"toy"', b'"\x00"'),
        (b'"toy"', b'"\\x"'),
        (b'"toy"', b"'toy'"),
        (b'"target"', b'"target": "onnx", "target"'),
        (b": 1,", b": 01,"),
        (b": 1,", b": 1.0,"),
        (b": 1,", b": -0,"),
        (b": 1,", b": NaN,"),
        (b": 1,", b": -Infinity,"),
        (b": 1,", b": " + b"9" * 5000 + b","),
        (b"{", b"{,"),
        (b"{", b"[{"),
        (b"{", b"\xef\xbb\xbf{"),
        (b"{", b"/* of C */ {"),
        (b": 1,", b": 1e5,"),
        (b": 1,", b": 1e400,"),
        (b": 1,", b": .5,"),
        (b": 1,", b": +1,"),
        (b": 1,", b": 0x1,"),
        (b": 1,", b": 18446744073709551615,"),
        (b": 1,", b": 9223372036854775808,"),
        (b": 1,", b": -9223372036854775808,"),
    ],
)
def test_both_runtimes_read_the_same_json(
    manifest: dict[str, Any], probe: Probe, tmp_path: Path, old: bytes, new: bytes
) -> None:
    text = json.dumps(manifest, indent=1).encode()
    assert old in text
    text = text.replace(old, new)
    assert _cpp(text, probe, tmp_path).partition(":")[0] == _python(text).partition(":")[0]


@pytest.mark.parametrize(("brackets", "message"), [(65, "schema_version"), (66, "nested too"), (10**6, "nested too")])
def test_depth_has_a_limit(probe: Probe, tmp_path: Path, brackets: int, message: str) -> None:
    """64 levels around an empty list are read, and refused for what they are; deeper ones are not even that."""
    (tmp_path / MANIFEST_NAME).write_text("[" * brackets + "]" * brackets)
    with pytest.raises(ProbeError, match=message) as error:
        probe.fingerprint(tmp_path)
    assert len(str(error.value)) < 500


def test_what_is_wrong_with_the_text_is_cut(probe: Probe, tmp_path: Path) -> None:
    """The parser quotes what it has read last, which may be anything of any length."""
    (tmp_path / MANIFEST_NAME).write_bytes(b'{"schema_version": "' + b"x" * 100_000 + b"\x1b[31m")
    with pytest.raises(
        ProbeError, match=r"manifest\.json: received invalid JSON \(parse error at line 1, column "
    ) as error:
        probe.fingerprint(tmp_path)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


def test_head_windows_of_no_layer(manifest: dict[str, Any]) -> None:
    """A model without windows has no groups of them: a list without any is no crash."""
    raw = copy.deepcopy(manifest)
    raw["head_windows"], raw["sink_tuning"] = [], None
    raw["states"] = [
        {
            "layer": 0,
            "kind": kind,
            "input": f"{kind}.0",
            "output": f"{kind}.0.next",
            "shape": [2, 3],
            "dtype": "float32",
        }
        for kind in ("conv", "recurrent")
    ]
    Manifest.from_json(json.dumps(raw))


def test_long_names_are_cut() -> None:
    with pytest.raises(BundleError) as error:
        Manifest.from_json(json.dumps({"schema_version": 1, "x" * 100_000: 1}))
    assert len(str(error.value)) < 10_000


def _mutations(manifest: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for path in _paths(manifest):
        for odd in ODD:
            changed = copy.deepcopy(manifest)
            _get(changed, path[:-1])[path[-1]] = odd
            yield f"{path} = {odd!r}"[:200], json.dumps(changed).encode()
        changed = copy.deepcopy(manifest)
        del _get(changed, path[:-1])[path[-1]]
        yield f"no {path}", json.dumps(changed).encode()
        if isinstance(path[-1], str):
            changed = copy.deepcopy(manifest)
            holder = _get(changed, path[:-1])
            holder["\x1b"] = holder.pop(path[-1])
            yield f"another name for {path}", json.dumps(changed).encode()


def _paths(value: Any, path: Place = ()) -> Iterator[Place]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _get(value: Any, path: Place) -> Any:
    for key in path:
        value = value[key]
    return value


def _python(text: bytes) -> str:
    """``taken <fingerprint>``, or ``refused: ..``; any other exception is a failure."""
    try:
        found = Manifest.from_json(text.decode())
    except BundleError as error:
        assert str(error).isprintable()
        return f"refused: {error}"
    return f"taken {found.fingerprint}"


def _cpp(text: bytes, probe: Probe, folder: Path) -> str:
    (folder / MANIFEST_NAME).write_bytes(text)
    try:
        return f"taken {probe.fingerprint(folder)}"
    except ProbeError as error:
        assert "\n" not in str(error)
        return f"refused: {error}"
