"""Bundles for the CPU library round where it is documented, and nowhere else.

Whole models, quantised: what each node of the library read and gave is held to a float64 emulation of the rounding that
plugins/README.md documents, by every instruction set of this processor, in steps and in chunks past the window's end. A
node's inputs are what it was really given, so that no router or recurrence of a random model amplifies an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from sinkexport.graph.cpu_nodes import BITS_OF_EXPERTS, BITS_OF_LINEARS
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION
from sinkexport.quant.recipe import load_recipe
from sinkrt.backends.cpu_library import is_usable

from tests.exporter.graph import cpu_judge
from tests.exporter.graph.cpu_attention_judge import AttentionJudge
from tests.exporter.graph.cpu_evaluator import node_weights
from tests.exporter.graph.shown_bundle import Shown, ShownBundle, kernels, node_fields
from tests.plugins.cpu import linear_cases
from tests.support import nightly_but, random_ids

pytestmark = pytest.mark.usefixtures("cpu_library")
ISAS = ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "neon_dot", "neon_i8mm")
GEOMETRY = {"num_sink_tokens": 2, "window_size": 14, "chunk_size": 10, "target": "cpu"}
SHORT_WINDOWS = {"gemma3_text": 5, "gemma3n_text": 5, "gemma4_text": 5, "gpt_oss": 7, "granitemoe_swa": 7}
"""Largest chunks of families whose layers have windows of their own."""
CASES = [
    ("llama", "int8-weights"),
    ("llama-tied", "int8-channel"),
    ("llama", "bf16-weights"),
    ("olmo2", "int4-nearest"),
    ("gpt_neox", "int8-dynamic"),
    ("bloom", "int4-nearest"),
    ("falcon-alibi", "int8-weights"),
    ("gemma2", "int8-weights"),
    ("gemma3_text", "int4-nearest"),
    ("gemma4_text", "int4-nearest"),
    ("gemma3n_text", "int8-weights"),
    ("gpt_oss", "int8-weights"),
    ("gpt_oss", "bf16-weights"),
    ("mixtral", "int8-weights"),
    ("minimax", "int8-dynamic"),
    ("dbrx", "int4-nearest"),
    ("lfm2_moe", "int8-weights"),
    ("granitemoe_swa", "int8-channel"),
    ("qwen3_next", "int8-channel"),
    ("falcon_h1", "int8-dynamic"),
    ("jamba", "int8-weights"),
    ("deepseek_v3", "bf16-weights"),
    ("hunyuan_v1_dense", "int4-nearest"),
    ("diffllama", "int8-weights"),
]
DAILY = [
    *[("llama", "int8-weights"), ("olmo2", "int4-nearest"), ("gpt_oss", "bf16-weights")],
    *[("minimax", "int8-dynamic"), ("qwen3_next", "int8-channel"), ("gemma4_text", "int4-nearest")],
]


def isas_here() -> list[str]:
    """Instruction sets that the library and this processor have."""
    found = []
    for isa in ISAS:
        with kernels(isa):
            found += [isa] if is_usable() else []
    return found


def fields_of(family: str, recipe: str | None) -> dict[str, Any]:
    """Fields of the export's config."""
    size = SHORT_WINDOWS.get(family, GEOMETRY["chunk_size"])
    recipes = {} if recipe is None else {"recipe": load_recipe(recipe)}
    return {**GEOMETRY, "chunk_size": size, **recipes}


def fed(bundle: ShownBundle) -> list[tuple[str, list[Shown]]]:
    """The nodes of each run: whole chunks and parts of one past the first eviction, then steps."""
    manifest = bundle.manifest
    size, capacity, window = manifest.stream.chunk_size, manifest.stream.capacity, manifest.stream.window_size
    ids = random_ids(capacity + 2 * window + 2 * size, seed=1)
    runs = []
    lengths = [2, size, 1, size - 1] + [size] * -(-(capacity + window) // size)
    for length in lengths:
        bundle.chunk(ids[bundle.position : bundle.position + length])
        runs.append((f"chunk of {length} at {bundle.position - length}", bundle.nodes))
    for _ in range(4):
        bundle.step(int(ids[bundle.position]))
        runs.append((f"step {bundle.position - 1}", bundle.nodes))
    return runs


@pytest.mark.parametrize(("family", "recipe"), nightly_but(DAILY, CASES))
def test_every_node_rounds_as_documented(family: str, recipe: str, shared_export: Any, cpu_library: Path) -> None:
    folder = shared_export(family, **fields_of(family, recipe)).path
    kinds = set()
    for isa in isas_here():
        attention = AttentionJudge(rounds_chunks=isa == "avx512_bf16")
        for run, nodes in fed(ShownBundle(folder, cpu_library, isa)):
            for node in nodes:
                kinds.add(node.kind)
                error = attention.judged(node) if node.kind == SINK_ATTENTION else cpu_judge.judged(node)
                assert error <= 1, f"{isa}, {run}: {node.kind} {node.name} is off by {error:.2f} of its bound"
    assert any(kind.startswith(("Int8", "Int4", "Bf16")) for kind in kinds)


@pytest.mark.parametrize("wrong", ["group of 64 inputs", "scale of 128", "one output", "one token's bfloat16"])
def test_a_fault_is_seen(wrong: str, shared_export: Any, cpu_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds are tight enough: rounding that is a little different is beyond them."""
    folder = shared_export("llama-tied", **fields_of("llama-tied", "int8-channel")).path
    bundle = ShownBundle(folder, cpu_library, "portable")
    bundle.step(5)
    worst = {}
    if wrong == "group of 64 inputs":
        monkeypatch.setattr(linear_cases, "ACTIVATION_GROUP", 64)
    for node in bundle.nodes:
        if node.kind not in BITS_OF_LINEARS:
            continue
        got = node.outputs[0].copy()
        if wrong == "one output":
            got.reshape(-1)[3] *= 1 + 1e-3
        if wrong == "one token's bfloat16":
            got.view(np.uint32)[...] &= 0xFFFF0000
        if wrong == "scale of 128":
            got = got + (got - (node.inputs[-1] if node.fields["has_residual"] else 0)) / 127
        worst[node.name] = cpu_judge.judged(node._replace(outputs=[got]))
    assert min(worst.values()) > 1 if wrong != "group of 64 inputs" else max(worst.values()) > 1, worst


@pytest.mark.parametrize(("family", "recipe"), nightly_but(DAILY, CASES))
def test_quantised_graphs_are_those_in_float32(family: str, recipe: str, shared_export: Any) -> None:
    """A recipe changes numbers of matrices, and nothing else: no other node, no other order; half a step a weight."""
    rounded, plain = (shared_export(family, **fields_of(family, name)).path for name in (recipe, None))
    for role in ("decode", "prefill"):
        (nodes, weights), (wanted, exact) = (_described(onnx.load(path / f"{role}.onnx")) for path in (rounded, plain))
        assert nodes == wanted
        for (values, steps), (numbers, _) in zip(weights, exact, strict=True):
            assert (np.abs(values - numbers) <= steps * (0.5 + 1e-4)).all()


def _described(model: onnx.ModelProto) -> tuple[list[Any], list[tuple[np.ndarray, np.ndarray]]]:
    """Nodes by kind, fields and where their inputs come from; matrices of the library's nodes, with a step of each."""
    constants = {one.name: one for one in model.graph.initializer}
    places: dict[str, Any] = {}
    nodes, weights = [], []
    for node in model.graph.node:
        inputs = [(name, places.get(name, name)) for name in node.input]
        kind, fields = node.op_type, {}
        if node.domain == DOMAIN:
            fields = node_fields(node)
            bits = {**BITS_OF_LINEARS, **BITS_OF_EXPERTS}.get(kind)
            if bits is not None:
                first = 1 + (kind in BITS_OF_EXPERTS)
                given = [
                    onnx.numpy_helper.to_array(constants[name]) for name in node.input[first:] if name in constants
                ]
                weights.append(_matrix(given, fields, bits))
            kind = kind.replace("Int8", "Float").replace("Int4", "Float").replace("Bf16", "Float")
        elif kind == "Gather" and node.input[0] in constants:
            kind, inputs = "FloatRows", inputs[1:]  # of a table that is no output projection
        shown = [place for name, place in inputs if name not in constants]
        kept = {} if kind == "FloatRows" else {k: v for k, v in fields.items() if k not in OF_WEIGHTS}
        nodes.append((kind, shown, kept))
        places |= {name: (len(nodes), i) for i, name in enumerate(node.output)}
    return nodes, weights


OF_WEIGHTS = {"block_size", "has_zero_points", "scale_type", "bfloat16_chunks"}
"""Fields that a recipe may change."""


def _matrix(given: list[np.ndarray], fields: dict[str, Any], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of a packed matrix, and twice how far each may lie from what was rounded."""
    values = node_weights(list(given), fields, bits)
    if bits >= 16:
        return values, np.abs(values) * (2.0**-7 if bits == 16 else 0.0)
    codes = [np.full_like(given[0], code) for code in ((1, 0) if bits == 8 else (0x99, 0x88))]
    above, below = (node_weights([one, *given[1:]], fields, bits) for one in codes)
    # A range whose ends lie between two codes each is a code too long: one end is then off by up to a whole step.
    return values, np.abs(above - below) * (2 if fields["has_zero_points"] else 1)
