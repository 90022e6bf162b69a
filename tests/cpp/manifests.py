"""Manifests for the two readers of a manifest, Python's and C++'s: good ones, and ones with a fault each."""

from __future__ import annotations

import json
from typing import Any

from sinkrt.contract import SCHEMA_VERSION

SHA = "0" * 64
ENGINE = {
    "file": "engines/x",
    "bytes": 1,
    "sha256": SHA,
    "graph_sha256": SHA,
    "flavour": "TensorRT",
    "version": "8.5",
    "plugin_abi": None,
    "gpu": None,
    "compute_capability": None,
    "precision": "float16",
}


def changed(raw: dict[str, Any], path: str, value: Any) -> str:
    """The manifest's text with the value at a/b/0 replaced, or taken out for None."""
    copy = json.loads(json.dumps(raw))
    *parents, last = path.split("/")
    node = copy
    for name in parents:
        node = node[int(name) if isinstance(node, list) else name]
    if value is None:
        del node[last]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return json.dumps(copy)


def optional_facts(raw: dict[str, Any]) -> dict[str, Any]:
    """Facts that a toy's manifest lacks: tuning, act, windows, affine."""
    model = raw["model"]
    tuning = {"sha256": SHA, "first_token_scale": [[1.5] * model["num_q_heads"]] * model["num_layers"]}
    act = {"alpha": 5, "beta": 0.4, "min_queries": 32, "heads": [[True] * model["num_q_heads"]] * model["num_layers"]}
    window_size = raw["stream"]["window_size"]
    windows = [
        {"layer": layer, "kv_heads": list(range(model["num_kv_heads"])), "window_size": window_size}
        for layer in range(model["num_layers"])
    ]
    affine = {"sha256": SHA, "file": "decode.onnx", "has_inputs": True, "heads": [[0]] * model["num_layers"]}
    return {"tuning": tuning, "act": act, "windows": windows, "affine": affine}


def good_manifests(raw: dict[str, Any]) -> list[str]:
    """Texts with one more fact each."""
    facts = optional_facts(raw)
    changes: list[tuple[str, Any]] = [
        ("engines", {"decode": ENGINE}),
        ("schema_version", 1),
        (
            "quantization",
            {
                "recipe": "r",
                "weights": "int8",
                "activations": "float",
                "kv": "int8",
                "calibration_sha256": SHA,
                "thresholds": {"kl_divergence": 1},
            },
        ),
        ("sink_tuning", facts["tuning"]),
        ("sink_tuning", {**facts["tuning"], "act": facts["act"]}),
        ("head_windows", facts["windows"]),
        ("affine_attention", facts["affine"]),
    ]
    return [changed(raw, path, value) for path, value in changes]


def broken_streams(raw: dict[str, Any]) -> list[str]:
    """Texts that are no manifest, and faults of the whole, the model and the stream."""
    return [
        "",
        "{",
        "[]",
        "null",
        json.dumps(raw) + "x",
        "[" * 100_000,
        changed(raw, "more", 1),
        changed(raw, "target", None),
        changed(raw, "target", "other"),
        changed(raw, "schema_version", SCHEMA_VERSION + 1),
        changed(raw, "schema_version", True),
        changed(raw, "model/vocab_size", 0),
        changed(raw, "model/num_q_heads", 3),
        changed(raw, "model/head_dim", "8"),
        changed(raw, "model/extra", 1),
        changed(raw, "model/num_layers", 1.0),
        changed(raw, "stream/window_size", 0),
        changed(raw, "stream/chunk_size", 99),
        changed(raw, "stream/num_sink_tokens", -1),
        changed(raw, "stream/position_limit", 0),
        changed(raw, "stream/position_limit", 2**47 + 1),
        changed(raw, "schema_version", -3),
        changed(raw, "stream", {**raw["stream"], "batch": 65536, "num_sink_tokens": 2**47, "window_size": 2**47}),
        changed(raw, "stream", {**raw["stream"], "batch": 2**40, "window_size": 2**30}),
    ]


def broken_states(raw: dict[str, Any]) -> list[str]:
    """Faults of the tokenizer, of states, and of what does not go with them."""
    return [
        changed(raw, "tokenizer", {"file": "../x", "chat_template": None}),
        changed(raw, "tokenizer", {"file": "tokenizer.json", "chat_template": "/x"}),
        changed(raw, "states/0/kind", "odd"),
        changed(raw, "states/0/shape/1", 0),
        changed(raw, "states/0/kind", "attention_mass"),
        changed(raw, "states/0/kind", "sink_v"),
        changed(raw, "states/0/layer", 1),
        changed(raw, "states/0/input", "sink_k.00"),
        changed(raw, "states/0/output", raw["states"][1]["output"]),
        changed(raw, "states/0/dtype", "float16"),
        changed(raw, "states/0/shape/2", 3),
        changed(raw, "states/2/shape/2", 7),
        changed(raw, "states/0/shape/0", 2),
        changed(raw, "states/3/shape/3", 9),
        changed(raw, "states", raw["states"][1:]),
        changed(raw, "states", raw["states"][:3]),
        changed(raw, "states", [*raw["states"], raw["states"][0]]),
        changed(raw, "states/0/shape", [1] * 65),
        changed(raw, "states/0/shape", [1, 2**31, 2**31, 2**31]),
        changed(raw, "stream/num_sink_tokens", raw["stream"]["num_sink_tokens"] + 1),
        changed(raw, "stream/num_sink_tokens", 0),
        changed(raw, "stream/window_size", raw["stream"]["window_size"] + 1),
        changed(raw, "stream/batch", 2),
        changed(raw, "model/num_kv_heads", 1),
        changed(raw, "model/head_dim", 16),
        changed(raw, "model/vocab_size", 300),
    ]


def broken_graphs(raw: dict[str, Any]) -> list[str]:
    """Faults of graphs and files."""
    return [
        changed(raw, "graphs/prefill/num_tokens", 3),
        changed(raw, "graphs/decode/num_tokens", 2),
        changed(raw, "graphs/decode/inputs/0/shape", [2, 1]),
        changed(raw, "graphs/decode/outputs/0/dtype", "float16"),
        changed(raw, "graphs/decode/inputs/0/name", "a\x1b[2J"),
        changed(raw, "files/tokenizer.json", None),
        changed(raw, "files/chat_template.jinja", None),
        changed(raw, "files", {**raw["files"], "a\x07b": raw["files"]["decode.onnx"]}),
        json.dumps(raw)[:-1] + ',"target":"onnx"}',
        changed(raw, "plugin_abi", "1"),  # whose states are float16
        changed(raw, "states/0/output", raw["states"][0]["input"]),
        changed(raw, "states/0/dtype", "bool"),
        changed(raw, "graphs/decode/file", "missing.onnx"),
        changed(raw, "graphs/decode", None),
        changed(raw, "files/decode.onnx/sha256", "zz"),
        changed(raw, "files/decode.onnx/bytes", -1),
        changed(raw, "files", {**raw["files"], "../x": raw["files"]["decode.onnx"]}),
        changed(raw, "files", {**raw["files"], "/x": raw["files"]["decode.onnx"]}),
        changed(raw, "weights_dtype", "int8"),
    ]


def broken_options(raw: dict[str, Any]) -> list[str]:
    """Faults of what only some manifests have."""
    model, facts = raw["model"], optional_facts(raw)
    tuning, act, windows, affine = (facts[name] for name in ("tuning", "act", "windows", "affine"))
    return [
        changed(raw, "engines", {"other": ENGINE}),
        changed(raw, "engines", {"decode": {**ENGINE, "file": "/x"}}),
        changed(raw, "engines", {"decode": {**ENGINE, "flavour": "x"}}),
        changed(raw, "tokenizer", "x"),
        changed(raw, "quantization", {"recipe": "r"}),
        changed(raw, "sink_tuning", {**tuning, "first_token_scale": [[0.0]]}),
        changed(raw, "sink_tuning", {**tuning, "first_token_scale": [[1.0]] * 9}),
        *(
            changed(raw, "sink_tuning", {**tuning, "act": {**act, name: value}})
            for name, value in (
                ("alpha", 0.5),
                ("beta", 1.0),
                ("min_queries", 0),
                ("heads", [[True]]),
                ("heads", [[1] * model["num_q_heads"]] * model["num_layers"]),
                ("more", 1),
            )
        ),
        changed(raw, "head_windows", windows[1:]),
        changed(raw, "head_windows", [{**windows[0], "window_size": 0}]),
        changed(raw, "head_windows", [{**windows[0], "window_size": 1000}, *windows[1:]]),
        changed(raw, "affine_attention", {**affine, "heads": [[0]] * 9}),
        changed(raw, "affine_attention", {**affine, "file": "x"}),
        changed(raw, "affine_attention", {**affine, "heads": [[model["num_q_heads"]]] * model["num_layers"]}),
        changed(raw, "affine_attention", {**affine, "has_inputs": 1}),
        changed(raw, "affine_attention", {**affine, "sha256": "x"}),
    ]


def reported_faults(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """(text, part of the message that C++ gives)."""
    return [
        (changed(raw, "stream/batch", 2**70), "stream.batch: received float"),
        (json.dumps(raw)[:-1] + ',"target":"onnx"}', 'key "target" twice'),
        (changed(raw, "files", {**raw["files"], "a\ud800": raw["files"]["decode.onnx"]}), "JSON"),
        (changed(raw, "stream/window_size", 2**50), "at most 2"),
        (changed(raw, "graphs/decode/inputs/0/dtype", "int32"), "inputs of the decode graph"),
        (changed(raw, "graphs/prefill", None), "graphs: received decode"),
    ]
