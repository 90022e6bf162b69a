"""Bundles for the CPU library: nodes, logits beside --target onnx and the reference, states, refusals."""

from __future__ import annotations

import _ctypes
import collections
import copy
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from sinkexport.config import ExportConfig
from sinkexport.model.moe_layers import routers
from sinkexport.quant.recipe import load_recipe
from sinkrt import Session
from sinkrt.backends.cpu_library import is_usable
from sinkrt.contract import CPU_ABI
from sinkrt.contract.constants import CPU_LIBRARY_VARIABLE
from sinkrt.errors import BackendError, BundleError, UsageError

from tests.exporter.pipeline.test_families import WRAPS, assert_close, assert_streams_like_reference
from tests.exporter.tiny_models import tiny_model
from tests.support import export_model, random_ids, refused, run_cli

pytestmark = pytest.mark.usefixtures("cpu_library")
GEOMETRY = {"num_sink_tokens": 2, "window_size": 14, "chunk_size": 4}
TOLERANCE = 2e-4


def exported(family: str | Any, folder: Path, *, target: str = "cpu", **fields: Any) -> Session:
    model = tiny_model(family) if isinstance(family, str) else family
    export_model(model, folder, ExportConfig(target=target, **{**GEOMETRY, **fields}))
    return Session.load(folder, threads=2)


def kinds(folder: Path, role: str = "decode") -> collections.Counter[str]:
    """Nodes of a graph by operator."""
    graph = onnx.load(folder / f"{role}.onnx", load_external_data=False).graph
    return collections.Counter(node.op_type for node in graph.node)


def decoded(session: Session, ids: np.ndarray) -> np.ndarray:
    """Logits of every step, [T, B, vocab]."""
    return np.stack([np.array(session.step(column)) for column in ids.T])


# --- nodes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, "int8-weights", "int4-nearest", "int8-window", "bf16-weights"])
def test_five_nodes_a_layer(recipe: str | None, tmp_path: Path) -> None:
    fields = {} if recipe is None else {"recipe": load_recipe(recipe)}
    session = exported("llama", tmp_path / "bundle", **fields)
    layers = session.manifest.model.num_layers
    for role in ("decode", "prefill"):
        found = kinds(tmp_path / "bundle", role)
        assert found["SinkAttention"] == layers
        assert sum(n for kind, n in found.items() if kind.endswith("Linear")) == 4 * layers + 1
    assert sum(kinds(tmp_path / "bundle").values()) == 5 * layers + 3  # embedding, logits and the last token's row
    assert (session.manifest.target, session.manifest.plugin_abi) == ("cpu", CPU_ABI)


@pytest.mark.parametrize(
    "family",
    [
        *("qwen3", "gemma2", "gemma3_text", "granite", "phi3", "stablelm", "cohere"),
        *("gpt_neox", "bloom", "falcon", "falcon-groups", "falcon-alibi", "phi"),
    ],
)
def test_norms_of_heads_and_results_are_part_of_the_five_nodes(family: str, tmp_path: Path) -> None:
    session = exported(family, tmp_path / "bundle")
    layers = session.manifest.model.num_layers
    for role in ("decode", "prefill"):
        found = kinds(tmp_path / "bundle", role)
        assert found["SinkAttention"] == layers
        assert found["FloatLinear"] == 4 * layers + 1
        between = ("RMSNormalization", "LayerNormalization", "Split", "Slice", "Transpose", "Add")
        # The last norm of a chunk is of the last token's row alone, or of all rows.
        first = int(family == "bloom")  # the embeddings' norm
        assert sum(found[kind] for kind in between) <= first + (role == "prefill"), found
    # Scales of embeddings and logits, softcaps, views of the last row.
    tied = dict.fromkeys(("cohere", "falcon", "falcon-groups", "falcon-alibi"), 2)
    around = {"gemma2": 6, "gemma3_text": 3, "granite": 2, "bloom": 3, **tied}.get(family, 0)
    assert sum(kinds(tmp_path / "bundle").values()) == 5 * layers + 3 + around


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    exported("llama-tied", tmp_path / "bundle")
    assert kinds(tmp_path / "bundle")["FloatRows"] == 1
    graph = onnx.load(tmp_path / "bundle/decode.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer if tensor.name.endswith(".n16")]
    assert sum("embed" in name or "lm_head" in name for name in names) == 1


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "qwen2", "qwen3", "gemma2", "gpt_oss", "gpt_neox", "bloom", "mixtral", "deepseek_v2", "lfm2"),
        *("gemma3_text", "gemma4_text", "granite", "phi3", "stablelm", "cohere", "nanochat", "jetmoe"),
        *("jamba", "mamba2", "qwen3_next"),  # weights of standard operators too
        *(
            "olmo2",
            "hunyuan_v1_dense",
            "hunyuan_v1_moe",
            "qwen3_moe",
            "lfm2_moe",
            "dbrx",
            "granitemoe_swa",
            "gemma3n_text",
            "phi",
            "falcon",
            "falcon-groups",
            "falcon-alibi",
            "gpt_neox_japanese",
        ),
    ],
)
def test_dense_and_past_six_wraps(family: str, tmp_path: Path) -> None:
    """Steps and chunks, of streams at positions of their own."""
    model = tiny_model(family)
    session = exported(model, tmp_path / "bundle", batch=3)
    capacity = session.capacity
    ids = random_ids(3, capacity + WRAPS * session.window_size + 3)
    with torch.no_grad():
        dense = model(torch.from_numpy(ids[:, :capacity])).logits.numpy()
    for t, logits in enumerate(decoded(session, ids[:, :capacity])):
        assert_close(logits, dense[:, t], TOLERANCE, f"position {t}")
    session.reset()
    assert_streams_like_reference(session, model, ids, TOLERANCE)


def test_pairs_that_turn_in_a_part_of_a_head(tmp_path: Path) -> None:
    """GPT-J, whose tiny model has heads of a size that the kernel does not take."""
    config = transformers.GPTJConfig(vocab_size=97, n_positions=256, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(config).eval()
    session = exported(model, tmp_path / "bundle")
    assert sum(kinds(tmp_path / "bundle").values()) == 5 * 2 + 3
    ids = random_ids(1, session.capacity + WRAPS * session.window_size)
    with torch.no_grad():
        dense = model(torch.from_numpy(ids[:, : session.capacity])).logits.numpy()
    for t, logits in enumerate(decoded(session, ids[:, : session.capacity])):
        assert_close(logits, dense[:, t], TOLERANCE, f"position {t}")
    session.reset()
    assert_streams_like_reference(session, model, ids, TOLERANCE)


def test_tokens_are_those_of_the_standard_operators(tmp_path: Path) -> None:
    prompt = random_ids(1, 9)
    texts = []
    for target in ("onnx", "cpu"):
        session = exported("llama", tmp_path / target, target=target)
        logits = session.prefill(prompt)
        texts.append([])
        for _ in range(60):
            texts[-1].append(int(logits[0].argmax()))
            logits = session.step([texts[-1][-1]])
    assert texts[0] == texts[1]


def test_idle_streams_stand_still(tmp_path: Path) -> None:
    session = exported("llama", tmp_path / "bundle", batch=3)
    ids = random_ids(3, 40)
    want = decoded(session, ids)
    session.reset()
    taken = [0, 0, 0]
    random = np.random.default_rng(0)
    while min(taken) < 40:
        streams = [b for b in range(3) if taken[b] < 40 and random.random() < 0.6]
        if not streams:
            continue
        logits = np.array(session.step([ids[b, taken[b]] for b in streams], streams=streams))
        for b in streams:
            assert_close(logits[b], want[taken[b], b], 1e-5, f"stream {b} at {taken[b]}")
            taken[b] += 1


@pytest.mark.parametrize(
    ("recipe", "share"), [("int8-weights", 1.2), ("int8-channel", 1.5), ("int4-nearest", 1.2), ("int8-dynamic", 1.2)]
)
def test_rounding_costs_what_it_costs_in_standard_operators(recipe: str, share: float, tmp_path: Path) -> None:
    """The error of the logits beside those of float32, as a share of that of ONNX Runtime's operators."""
    model, ids = tiny_model("llama"), random_ids(2, 40)
    fields = {"batch": 2, "chunk_size": 1}
    exact = decoded(exported(model, tmp_path / "exact", target="onnx", **fields), ids)
    errors = {}
    for target in ("onnx", "cpu"):
        session = exported(model, tmp_path / target, target=target, recipe=load_recipe(recipe), **fields)
        errors[target] = float(np.sqrt(np.square(decoded(session, ids) - exact).mean()))
    assert 0 < errors["cpu"] <= share * errors["onnx"], errors


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mixtral", "gpt_oss"])
def test_bfloat16_weights_are_the_models_rounded(family: str, tmp_path: Path) -> None:
    """Exact for the model whose matrices are rounded: all but untied embeddings and routers."""
    model = tiny_model(family)
    session = exported(model, tmp_path / "bundle", recipe=load_recipe("bf16-weights"))
    assert any(kind.startswith("Bf16") for kind in kinds(tmp_path / "bundle"))
    rounded = copy.deepcopy(model)
    kept = {f"{name}.weight" for name in routers(rounded)}
    embedding = None if model.config.tie_word_embeddings else rounded.get_input_embeddings().weight
    for name, parameter in rounded.named_parameters():
        if parameter.dim() > 1 and name not in kept and parameter is not embedding and "bias" not in name:
            parameter.data = parameter.data.bfloat16().float()
    ids = random_ids(1, session.capacity)
    with torch.no_grad():
        dense = rounded(torch.from_numpy(ids)).logits.numpy()
    for t, logits in enumerate(decoded(session, ids)):
        assert_close(logits, dense[:, t], TOLERANCE, f"position {t}")


def test_bfloat16_is_for_the_library_alone() -> None:
    with refused("recipe 'bf16-weights': received target onnx, expected cpu", error=UsageError):
        ExportConfig(target="onnx", recipe=load_recipe("bf16-weights"))


def test_an_int8_window_is_that_of_the_standard_operators(tmp_path: Path) -> None:
    ids = random_ids(2, 60)
    got, want = (
        decoded(exported("llama", tmp_path / target, target=target, kv="int8", batch=2), ids)
        for target in ("cpu", "onnx")
    )
    assert_close(got, want, 0.02, "INT8 window")


# --- states ----------------------------------------------------------------------------------------------------------


def test_states_in_two_buffers_are_copied(tmp_path: Path, cpu_library: Path) -> None:
    """Sessions bind input and output of a state to one buffer; other callers need not."""
    session = exported("llama", tmp_path / "bundle", chunk_size=1)
    manifest, ids = session.manifest, random_ids(1, 40)
    want = decoded(session, ids)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(cpu_library))
    graph = ort.InferenceSession(tmp_path / "bundle/decode.onnx", options, providers=["CPUExecutionProvider"])
    states = {state.input: np.zeros(state.shape, state.dtype) for state in manifest.states}
    names = ["logits", *(state.output for state in manifest.states)]
    for t in range(ids.shape[1]):
        before = {name: value.copy() for name, value in states.items()}
        inputs = {"ids": ids[:, t : t + 1], "position": np.array([t])}
        logits, *after = graph.run(names, {**inputs, **states})
        assert all((states[name] == value).all() for name, value in before.items())
        states = {state.input: value for state, value in zip(manifest.states, after, strict=True)}
        assert_close(logits, want[t], 1e-5, f"step {t}")


@pytest.mark.parametrize("recipe", [None, "int8-weights", "int4-nearest"])
def test_forced_instruction_sets_agree(recipe: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole bundle by all kernels of this processor: chunks, a part of a chunk, and steps past two wraps."""
    fields = {} if recipe is None else {"recipe": load_recipe(recipe)}
    exported("llama", tmp_path / "bundle", **fields).close()
    ids, tried, wanted = random_ids(1, 45), [], {}
    for name in ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "neon_dot", "neon_i8mm"):
        monkeypatch.setenv("SINKEXPORT_CPU_ISA", name)
        if not is_usable():
            continue
        tried.append(name)
        with Session.load(tmp_path / "bundle", threads=1) as session:
            found = {"steps": decoded(session, ids)}
            for part in (3, 11):
                session.reset()
                found[f"chunks of {part} tokens"] = session.prefill(ids[:, :part])[0].copy()
        for how, logits in found.items():
            # Its chunks may round what attention multiplies to bfloat16 where weights are rounded anyway.
            rounds = name == "avx512_bf16" and how != "steps"
            tolerance = 1e-4 if recipe is None else 0.06 if rounds else 1e-2
            assert_close(logits, wanted.setdefault(how, logits), tolerance, f"{name}, {how}")
    assert tried[0] == "portable"
    assert len(tried) > 1 or platform.machine() not in ("x86_64", "aarch64")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(shared_export: Any) -> Path:
    """A bundle that tests only read."""
    path: Path = shared_export("llama", target="cpu", **GEOMETRY).path
    return path


def test_no_library(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(tmp_path / "nothing.so"))
    with refused("CPU library: received", "nothing.so", "--target onnx", error=BackendError):
        Session.load(bundle)
    run_cli("bench", bundle).refusal("CPU library: received")


def test_a_library_of_another_kind(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, _ctypes.__file__)
    with refused("CPU library: received", "sinkexport_cpu_abi", error=BackendError):
        Session.load(bundle)


def test_a_bundle_for_another_version(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    raw = json.loads((folder / "manifest.json").read_text())
    for abi, shown in (("99", "99"), (None, "None")):
        (folder / "manifest.json").write_text(json.dumps({**raw, "plugin_abi": abi}))
        with refused(f"CPU library: received a bundle for its version {shown}, expected {CPU_ABI}", error=BackendError):
            Session.load(folder)


@pytest.mark.parametrize("name", ["sse9", "neon_i8mm"])
def test_instruction_sets_that_the_processor_has_not(bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINKEXPORT_CPU_ISA", name)
    with refused("CPU library: SINKEXPORT_CPU_ISA: received", name, error=BackendError):
        Session.load(bundle)


def test_other_backends_do_not_run_it(bundle: Path) -> None:
    with refused("backend 'ort-cuda': received a bundle for the CPU library", error=BackendError):
        Session.load(bundle, backend="ort-cuda")


def fields_of(node: onnx.NodeProto) -> onnx.AttributeProto:
    """The attribute with all fields of a node."""
    return next(attribute for attribute in node.attribute if attribute.name == "fields")


def save_decode(model: onnx.ModelProto, folder: Path) -> None:
    """Replace a bundle's decode graph, and its size in the manifest."""
    onnx.save(model, folder / "decode.onnx")
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"]["decode.onnx"]["bytes"] = (folder / "decode.onnx").stat().st_size
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_a_node_without_fields(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "FloatLinear")
    node.attribute.remove(fields_of(node))
    save_decode(model, folder)
    with refused("a graph that ONNX Runtime refuses", "fields: received nothing", error=BundleError):
        Session.load(folder, verify=False)


@pytest.mark.parametrize(
    ("kind", "field", "value", "shown"),
    [
        ("FloatLinear", "activation", "swish", "activation: received 'swish', expected none | silu"),
        ("FloatLinear", "layout", "n32", "layout: received 'n32', expected n16"),
        ("FloatLinear", "gated", None, "gated: received nothing"),
        ("FloatLinear", "out_features", 7, "received"),
        ("FloatLinear", "in_features", 1 << 40, "in_features: received 1099511627776"),
        ("FloatLinear", "norm", 3, "norm: received 3, expected 0 .. 2"),
        ("FloatLinear", "has_norm_bias", 1, "has_norm_bias: received 1, expected 0 without a layer norm"),
        ("FloatLinear", "multiplier", None, "multiplier: received nothing"),
        ("FloatLinear", "num_tokens", 3, "num_tokens: received 3, expected a number that divides the 1 rows"),
        ("FloatLinear", "num_tokens", 1, "num_valid: received nothing"),
        ("FloatLinear", "repeats_last", 2, "repeats_last: received 2, expected 0 .. 1"),
        ("FloatLinear", "temper", 1, "fields: received 'temper', expected fields that this version of the library"),
        ("FloatLinear", "in_features", "8x", "in_features: received '8x', expected an integer"),
        ("FloatLinear", "in_features", "", "in_features: received '', expected an integer"),
        ("FloatLinear", "in_features", "8,in_features=8", "fields: received 'in_features' twice"),
        ("FloatLinear", "in_features", "8\0,newer=1", "a text with a zero byte in it"),
        ("SinkAttention", "scale", "1e999", "scale: received"),
        ("SinkAttention", "scale", "0,5", "fields: received '5'"),
        ("SinkAttention", "qk_norm_epsilon", -1.0, "qk_norm_epsilon: received -1, expected a finite number >= 0"),
        ("SinkAttention", "qk_norm", 1, "q_norm_weight: received nothing"),
        ("SinkAttention", "qk_norm", 3, "qk_norm: received 3, expected 0 .. 2"),
        ("SinkAttention", "has_v_norm", 1, "v_norm_weight: received nothing"),
        ("SinkAttention", "turned_weights", 2, "q_turned_weight: received nothing"),
        ("SinkAttention", "reads_only", 1, "received"),
        ("FloatLinear", "activation", "clamped_swiglu", "activation: received clamped_swiglu without gates"),
        ("SinkAttention", "num_sinks", 3, "received"),
        ("SinkAttention", "packed_width", 5, "received"),
        ("SinkAttention", "rotary_dim", 1 << 30, "received"),
        ("SinkAttention", "scale", float("nan"), "scale: received 'nan', expected a finite number"),
    ],
)
def test_fields_that_do_not_fit(
    kind: str, field: str, value: Any, shown: str, bundle: Path, cpu_library: Path, tmp_path: Path
) -> None:
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    attribute = next(fields_of(node) for node in model.graph.node if node.op_type == kind)
    pairs = dict(one.split("=") for one in attribute.s.decode().split(","))
    pairs |= {field: value}
    attribute.s = ",".join(f"{name}={text}" for name, text in pairs.items() if text is not None).encode()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(cpu_library))
    shutil.copy(bundle / "weights.bin", tmp_path)
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(Exception, match="received") as caught:
        ort.InferenceSession(tmp_path / "changed.onnx", options, providers=["CPUExecutionProvider"])
    message = str(caught.value)
    assert kind in message
    assert shown in message
    assert "\n" not in message.strip()


def test_a_field_of_a_later_version_is_noticed(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "fields":
                attribute.s += b",temper=1"
    save_decode(model, folder)
    with refused("fields: received 'temper', expected fields that this version of the library", error=BundleError):
        Session.load(folder, verify=False)


def test_a_graph_that_the_library_refuses_is_refused_in_one_line(bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = onnx.load(folder / "decode.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "fields":
                attribute.s = attribute.s.replace(b"layout=n16", b"layout=n64")
    onnx.save(model, folder / "decode.onnx")
    with refused("a graph that ONNX Runtime refuses", "layout: received 'n64'", error=BundleError):
        Session.load(folder, verify=False)


def test_a_library_that_was_cut_short(
    bundle: Path, cpu_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut.so").write_bytes(cpu_library.read_bytes()[:100_000])
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(tmp_path / "cut.so"))
    with refused("CPU library: received", "cut.so", "was cut short", error=BackendError):
        Session.load(bundle)
    run_cli("bench", bundle).refusal("CPU library: received", "was cut short")


def test_threads_end_with_the_last_session(bundle: Path) -> None:
    """A count of its own, which no other test's sessions share."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = threads()
    first, second = (Session.load(bundle, threads=13) for _ in range(2))
    assert threads() >= before + 12
    first.close()
    assert [second.step([i % 7]).shape for i in range(3)]
    second.close()
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # the kernel's list is behind
    assert threads() <= before
    with Session.load(bundle, threads=13) as again:
        again.step([3])


FEW_THREADS = """
import os, resource, sys, time
from sinkrt import Session
from sinkrt.errors import BackendError
Session.load(sys.argv[1], threads=1).close()
before = len(os.listdir("/proc/self/task"))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (800 << 20),) * 2)
for _ in range(2):
    try:
        Session.load(sys.argv[1], threads=1024)
    except BackendError as error:
        print(error)
deadline = time.monotonic() + 10
while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_threads_that_do_not_start(bundle: Path) -> None:
    """In a process that has no memory for the stacks of all: those that had started end."""
    command = [sys.executable, "-c", FEW_THREADS, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    *refusals, left = done.stdout.splitlines()
    assert left == "0"
    assert len(refusals) == 2
    for line in refusals:
        assert line.startswith("CPU library: received")
        assert "expected 1024" in line and "ask for fewer threads" in line
