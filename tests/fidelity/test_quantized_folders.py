"""Quantised model folders: every number as the format says, and in the graph the very integers of the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.loading.weights.graph_weights import GraphMatrix, read_graph
from sinkexport.pipeline.export import export, export_loaded
from sinkexport.pipeline.stored_weights import STORED
from sinkexport.quant.recipe import load_recipe
from sinkexport.sources import LoadedModel, load_model, locate
from sinkrt import Session

from tests.fidelity import quantized_folders as q
from tests.fidelity.quantized_folders import Folder, Pack, quantized_folder
from tests.support import nightly_but, random_ids, refused, run_cli

GEOMETRY: dict[str, Any] = {"num_sink_tokens": 2, "window_size": 12, "chunk_size": 4, "target": "onnx"}
EXACT, ROUNDED = 2e-5, 0.35
"""Largest error of a logit as a share of the logits' spread: of floating-point inputs, and of inputs in 8 bits."""

KINDS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "gptq": q.gptq(),
    "gptq-symmetric": q.gptq(sym=True),
    "gptq-v2": q.gptq(version="gptq_v2"),
    "gptq-channel": q.gptq(group_size=-1),
    "gptq-bfloat16": q.gptq(dtype=torch.bfloat16),
    "gptq-8": q.gptq(8, 64),
    "gptq-8-symmetric": q.gptq(8, sym=True),
    "gptq-3": q.gptq(3),
    "gptq-2": q.gptq(2, 16),
    "gptq-shared-order": q.gptq(order="shared"),
    "gptq-own-order": q.gptq(order="own"),
    "gptq-uneven": q.gptq(order="uneven"),
    "awq": q.awq(),
    "awq-64": q.awq(64),
    "packed": q.packed(),
    "packed-zero-points": q.packed(symmetric=False),
    "packed-channel": q.packed(group_size=None),
    "packed-8": q.packed(8, None),
    "packed-8-zero-points": q.packed(8, 32, symmetric=False),
    "packed-2": q.packed(2),
    "int8": q.int8(),
    "int8-zero-points": q.int8(symmetric=False),
    "int8-tensor": q.int8(per_tensor=True),
    "fp8-blocks": q.fp8(),
    "fp8-channel": q.fp8("channel"),
    "fp8-tensor": q.fp8("tensor"),
    "compressed-fp8": q.fp8("channel", compressed=True),
}

KEPT: dict[str, tuple[str, str]] = {
    "gptq": ("14 x GPTQ 4 bits kept in 4 bits, blocks of 32, zero points",) * 2,
    "gptq-symmetric": ("14 x GPTQ 4 bits kept in 4 bits, blocks of 32",) * 2,
    "gptq-8-symmetric": ("14 x GPTQ 8 bits kept in 8 bits, blocks of 32",) * 2,
    "gptq-3": ("14 x GPTQ 3 bits kept in 4 bits, blocks of 32, zero points",) * 2,
    "gptq-2": ("14 x GPTQ 2 bits kept in 4 bits, blocks of 16, zero points",) * 2,
    "gptq-own-order": ("14 x GPTQ 4 bits kept in 4 bits, blocks of 32, zero points",) * 2,
    "awq": ("14 x AWQ 4 bits kept in 4 bits, blocks of 32, zero points",) * 2,
    "packed": ("14 x compressed-tensors 4 bits kept in 4 bits, blocks of 32",) * 2,
    "packed-8-zero-points": ("14 x compressed-tensors 8 bits kept in 8 bits, blocks of 32, zero points",) * 2,
    "int8": (
        "2 x compressed-tensors 8 bits kept in 8 bits, blocks of 128; "
        "12 x compressed-tensors 8 bits kept in 8 bits, blocks of 64",
        "14 x compressed-tensors 8 bits kept in 8 bits, a scale for each output",
    ),
    "fp8-blocks": ("14 x FP8 dequantised",) * 2,
}
"""What the export says, for targets onnx and cpu."""

DAILY = ("gptq", "gptq-own-order", "awq", "packed-8-zero-points", "int8", "fp8-blocks")


def made(path: Path, kind: str, **options: Any) -> Folder:
    """A folder of a kind."""
    pack, facts = KINDS[kind]
    return quantized_folder(path, pack, json.loads(json.dumps(facts)), **options)


def logits(bundle: Path, ids: np.ndarray) -> np.ndarray:
    """float32 [vocab], after the last id."""
    with Session.load(bundle, verify=False) as session:
        return np.array(session.prefill(ids)[0])


def reference_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """The same of transformers' model."""
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits[0, -1].numpy()


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error as a share of the spread."""
    return float(np.abs(got - wanted).max() / wanted.std())


def take_floating_inputs(bundle: Path) -> None:
    """Let MatMulNBits multiply inputs as they are, which is slow: only the weights are rounded then."""
    for path in bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
        onnx.save(model, path)


def numbers_of(bundle: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter that a graph has under its own name, read back from its integers, float32 [N, K]."""
    for matrix in read_graph(bundle / "decode.onnx"):
        if matrix.parts and matrix.swapped is None:
            yield from _parts(matrix)


def _parts(matrix: GraphMatrix) -> Iterator[tuple[str, np.ndarray]]:
    count, width = matrix.shape
    values, _ = matrix.read(np.arange(count), np.arange(width))
    shares = {"q_proj": count // 2, "k_proj": count // 4, "v_proj": count // 4} if len(matrix.parts) == 3 else {}
    start = 0
    for part in matrix.parts:
        rows = shares.get(part.split(".")[-2], count // len(matrix.parts))
        yield part, values[start : start + rows]
        start += rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_the_formats(kind: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", kind)
    parameters = dict(load_model(str(folder.path)).model.named_parameters())
    assert len(folder.weights) == 14
    for name, values in folder.weights.items():
        assert np.array_equal(parameters[name].detach().numpy(), values), name


@pytest.mark.parametrize("kind", nightly_but(DAILY, KINDS))
def test_integers_lie_in_the_graph_bit_by_bit(kind: str, tmp_path: Path) -> None:
    """Read back and compared with the format's numbers, then run with inputs that are not rounded."""
    folder, bundle = made(tmp_path / "model", kind), tmp_path / "bundle"
    manifest = export(str(folder.path), bundle, ExportConfig(**GEOMETRY))
    found = dict(numbers_of(bundle))
    for name, values in folder.weights.items():
        assert np.array_equal(found[name], values), name
    if kind in KEPT:
        assert manifest.producer[STORED] == KEPT[kind][0]
    assert (manifest.quantization is None) == ("fp8" in kind)
    ids = random_ids(1, 10, vocab_size=q.VOCAB)
    wanted = reference_logits(folder.reference(), ids)
    assert error(logits(bundle, ids), wanted) < (EXACT if "fp8" in kind else ROUNDED)
    take_floating_inputs(bundle)
    assert error(logits(bundle, ids), wanted) < EXACT


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("kind", nightly_but(DAILY, KINDS))
def test_the_cpu_library_reads_the_same_integers(kind: str, tmp_path: Path) -> None:
    folder, bundle = made(tmp_path / "model", kind), tmp_path / "bundle"
    manifest = export(str(folder.path), bundle, ExportConfig(**GEOMETRY | {"target": "cpu"}))
    if kind in KEPT:
        assert manifest.producer[STORED] == KEPT[kind][1]
    nodes = [node.op_type for node in onnx.load(bundle / "decode.onnx", load_external_data=False).graph.node]
    assert ("Int4Linear" in nodes) == (KEPT.get(kind, ("", ""))[1].count("kept in 4 bits, blocks of 32") > 0) or (
        kind not in KEPT
    )
    ids = random_ids(1, 10, vocab_size=q.VOCAB)
    wanted = reference_logits(folder.reference(), ids)
    assert error(logits(bundle, ids), wanted) < (EXACT if "fp8" in kind else ROUNDED)


MODELS: dict[str, dict[str, Any]] = {
    "fused": {"model_type": "phi3", "pad_token_id": 0},
    "tied": {"tie_word_embeddings": True},
    "head": {"also": ("lm_head",)},
    "biases": {"model_type": "qwen2"},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    ("model", "kind"),
    nightly_but(
        [("fused", "gptq"), ("experts", "int8"), ("head", "packed"), ("biases", "gptq-shared-order")],
        [(model, kind) for model in MODELS for kind in ("gptq", "packed", "int8", "gptq-shared-order")],
    ),
)
def test_what_becomes_of_whole_rows_is_followed(model: str, kind: str, tmp_path: Path) -> None:
    """Fused and stacked projections, an output projection, biases beside integers, a tied table."""
    folder, bundle = made(tmp_path / "model", kind, **MODELS[model]), tmp_path / "bundle"
    manifest = export(str(folder.path), bundle, ExportConfig(**GEOMETRY))
    words = manifest.producer[STORED]
    dequantised = 24 if model == "experts" and kind != "int8" else 0
    assert (f"{dequantised} x" in words and "dequantised" in words) if dequantised else "dequantised" not in words
    ids = random_ids(1, 10, vocab_size=q.VOCAB)
    take_floating_inputs(bundle)
    limit = 1e-3 if model == "experts" and kind == "int8" else EXACT  # experts' inputs have 15 bits
    assert error(logits(bundle, ids), reference_logits(folder.reference(), ids)) < limit


@pytest.mark.usefixtures("cpu_library")
def test_experts_of_four_bits_are_kept_in_eight(tmp_path: Path) -> None:
    """The CPU library has no experts of 4 bits: integers less their zero points fit 8."""
    folder = made(tmp_path / "model", "gptq", **MODELS["experts"])
    manifest = export(str(folder.path), tmp_path / "bundle", ExportConfig(**GEOMETRY | {"target": "cpu"}))
    assert "24 x GPTQ 4 bits kept in 8 bits, blocks of 32" in manifest.producer[STORED]
    ids = random_ids(1, 10, vocab_size=q.VOCAB)
    assert error(logits(tmp_path / "bundle", ids), reference_logits(folder.reference(), ids)) < ROUNDED


def test_projections_of_one_order_are_one_matmul(tmp_path: Path) -> None:
    """Activation order of one input: one Gather and one matmul. Orders of their own: each has both."""

    def counted(kind: str) -> tuple[int, int]:
        bundle = tmp_path / f"{kind}-bundle"
        export(str(made(tmp_path / kind, kind, layers=1).path), bundle, ExportConfig(**GEOMETRY | {"chunk_size": 1}))
        nodes = onnx.load(bundle / "decode.onnx", load_external_data=False).graph.node
        orders = [n for n in nodes if n.op_type == "Gather" and any("input_order" in i for i in n.input)]
        return sum(node.op_type == "MatMulNBits" for node in nodes), len(orders)

    assert counted("gptq") == (4, 0)
    assert counted("gptq-shared-order") == (4, 4)
    assert counted("gptq-own-order") == (7, 7)


def test_half_precision_where_it_holds_the_scales(tmp_path: Path) -> None:
    """float16 scales stay; bfloat16 ones that float16 has not are refused their integers, and said so."""
    config = ExportConfig(**GEOMETRY, dtype="fp16")
    half = export(str(made(tmp_path / "a", "gptq").path), tmp_path / "b", config, check=False)
    assert "kept in 4 bits" in half.producer[STORED]
    folder = made(tmp_path / "c", "packed")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    folder.tensors[name] *= 1e-6  # subnormal in float16
    folder.write()
    words = export(str(folder.path), tmp_path / "d", config, check=False).producer[STORED]
    assert "2 x compressed-tensors 4 bits dequantised to float16" in words  # gate and up are one matmul


@pytest.mark.parametrize("native", nightly_but([False], [False, True]))
def test_per_channel_integers_for_tensorrt(native: bool, tmp_path: Path) -> None:
    """Int8Linear and Q/DQ take 8 bits with a scale for each output; blocks of 8 bits become float16."""
    config = ExportConfig(**GEOMETRY | {"dtype": "fp16", "target": "tensorrt"}, native=native)
    sizes = {"hidden_size": 256}
    kept = export(str(made(tmp_path / "a", "int8", **sizes).path), tmp_path / "b", config, check=False)
    assert kept.producer[STORED] == "14 x compressed-tensors 8 bits kept in 8 bits, a scale for each output"
    words = export(str(made(tmp_path / "c", "gptq-8", **sizes).path), tmp_path / "d", config, check=False).producer[
        STORED
    ]
    assert words == "14 x GPTQ 8 bits dequantised to float16"


FOR_THE_PLUGIN = {
    "gptq": "14 x GPTQ 4 bits kept in 4 bits, blocks of 32, zero points",
    "gptq-symmetric": "14 x GPTQ 4 bits kept in 4 bits, blocks of 32",
    "gptq-channel": "14 x GPTQ 4 bits kept in 4 bits, blocks of 128, zero points",
    "gptq-3": "14 x GPTQ 3 bits kept in 4 bits, blocks of 32, zero points",
    "gptq-2": "14 x GPTQ 2 bits dequantised to float16",
    "gptq-own-order": "14 x GPTQ 4 bits kept in 4 bits, blocks of 32, zero points",
    "awq-64": "14 x AWQ 4 bits kept in 4 bits, blocks of 64, zero points",
    "packed": "14 x compressed-tensors 4 bits kept in 4 bits, blocks of 32",
}
"""Kinds, and what an export for the TensorRT plugin says. Blocks of 16 are smaller than its kernels have."""


@pytest.mark.parametrize("kind", nightly_but(["gptq", "gptq-own-order", "packed"], FOR_THE_PLUGIN))
def test_four_bits_lie_in_tiles_of_the_plugin(kind: str, tmp_path: Path) -> None:
    """Read back, they are the format's numbers."""
    folder, bundle = made(tmp_path / "model", kind, hidden_size=256), tmp_path / "bundle"
    config = ExportConfig(**GEOMETRY | {"dtype": "fp16", "target": "tensorrt"})
    assert export(str(folder.path), bundle, config).producer[STORED] == FOR_THE_PLUGIN[kind]
    if "kept" in FOR_THE_PLUGIN[kind]:
        found = dict(numbers_of(bundle))
        for name, values in folder.weights.items():
            assert np.array_equal(found[name], values), name


def test_experts_of_four_bits_for_the_plugin(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "gptq", hidden_size=256, **MODELS["experts"])
    config = ExportConfig(**GEOMETRY | {"dtype": "fp16", "target": "tensorrt"})
    words = export(str(folder.path), tmp_path / "bundle", config).producer[STORED]
    assert "dequantised" not in words
    nodes = [
        node.op_type for node in onnx.load(tmp_path / "bundle" / "decode.onnx", load_external_data=False).graph.node
    ]
    assert nodes.count("Int4ExpertLinear") == 4


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_floating_point_is_what_the_user_asks_for(tmp_path: Path) -> None:
    folder, bundle = made(tmp_path / "model", "gptq"), tmp_path / "bundle"
    done = run_cli("export", folder.path, "-o", bundle, "--window", "12", "--recipe", "stored-float").succeeded()
    assert "quantised weights: 14 x GPTQ 4 bits dequantised" in done.out
    ids = random_ids(1, 10, vocab_size=q.VOCAB)
    assert error(logits(bundle, ids), reference_logits(folder.reference(), ids)) < EXACT


def test_an_int8_window_goes_with_stored_integers(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "gptq")
    manifest = export(str(folder.path), tmp_path / "bundle", ExportConfig(**GEOMETRY, kv="int8"))
    assert manifest.quantization is not None
    assert (manifest.quantization.recipe, manifest.quantization.weights) == ("stored", "int4")
    assert manifest.quantization.kv == "int8"


@pytest.mark.parametrize("recipe", ["int8-weights", "int8-window"])
def test_integers_are_not_rounded_again(recipe: str, tmp_path: Path) -> None:
    folder, bundle = made(tmp_path / "model", "gptq"), tmp_path / "bundle"
    done = run_cli("export", folder.path, "-o", bundle, "--recipe", recipe)
    done.refusal(f"recipe '{recipe}'", "quantised already", "'stored' or 'stored-float'", "leave --recipe out")
    assert not bundle.exists()


@pytest.mark.parametrize("recipe", ["stored", "stored-float"])
def test_floating_point_has_nothing_stored(recipe: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "gptq")
    folder.reference()
    done = run_cli("export", tmp_path / "model-float", "-o", tmp_path / "b", "--recipe", recipe)
    done.refusal(f"recipe '{recipe}'", "floating point", "a quantised checkpoint")


# --- what is refused --------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.q_proj"


def _config(**changes: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.config["quantization_config"].update(changes)


def _group(**changes: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.config["quantization_config"]["config_groups"]["group_0"].update(changes)


def _weights(**changes: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def _without(suffix: str) -> Callable[[Folder], None]:
    return lambda folder: folder.tensors.__delitem__(f"{LAYER}.{suffix}")


def _changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Folder], None]:
    name = f"{LAYER}.{suffix}"
    return lambda folder: folder.tensors.__setitem__(name, change(folder.tensors[name]))


def _also(suffix: str, tensor: torch.Tensor) -> Callable[[Folder], None]:
    return lambda folder: folder.tensors.__setitem__(f"{LAYER}.{suffix}", tensor)


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def _no_groups(folder: Folder) -> None:
    """Groups of -1 for every matrix, which older files keep where there is no order."""
    for name, packed in list(folder.tensors.items()):
        if name.endswith("weight_packed"):
            groups = torch.full((packed.shape[1] * 8,), -1, dtype=torch.int32)
            folder.tensors[name.replace("weight_packed", "weight_g_idx")] = groups


SAYS_NOTHING: dict[str, tuple[str, Callable[[Folder], object]]] = {
    "modules that are left out": ("gptq", _config(dynamic={"-:.*lm_head.*": {}})),
    "groups of no order": ("packed", _no_groups),
}


@pytest.mark.parametrize("case", SAYS_NOTHING)
def test_settings_that_say_nothing_of_the_numbers(case: str, tmp_path: Path) -> None:
    kind, change = SAYS_NOTHING[case]
    folder, bundle = made(tmp_path / "model", kind), tmp_path / "bundle"
    change(folder)
    run_cli("export", folder.write(), "-o", bundle, "--window", "12", "--recipe", "stored-float").succeeded()
    ids = random_ids(1, 9)
    assert error(logits(bundle, ids), reference_logits(folder.reference(), ids)) < 1e-4


REFUSED: dict[str, tuple[str, Callable[[Folder], None], str]] = {
    "an unknown key": ("gptq", _config(clip=1.0), "the key 'clip'"),
    "other bits for some modules": ("gptq", _config(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic"),
    "five bits": ("gptq", _config(bits=5), "bits 5"),
    "bits that are a boolean": ("gptq", _config(bits=True), "bits True"),
    "another format": ("gptq", _config(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "two formats": ("gptq", _config(format="gptq_v2"), "formats gptq and gptq_v2"),
    "no group size": ("gptq", lambda f: f.config["quantization_config"].pop("group_size"), "no group_size"),
    "another group size": ("gptq", _config(group_size=64), "down_proj.scales' [4, 64], expected 2 x 64"),
    "no scales": ("gptq", _without("scales"), "without its scales"),
    "no zero points": ("gptq", _without("qzeros"), "without its qzeros"),
    "no integers": ("gptq", _without("qweight"), "without its qweight"),
    "integers as numbers": ("gptq", _changed("qweight", torch.Tensor.float), "of type F32"),
    "scales as integers": ("gptq", _changed("scales", torch.Tensor.int), "of type I32"),
    "cut integers": ("gptq", _changed("qweight", lambda t: t[:-1]), "g_idx' [64], expected 56"),
    "a group too many": ("gptq", _changed("g_idx", _filled(7)), "group 7"),
    "a negative group": ("gptq", _changed("g_idx", _filled(-1)), "groups 0 .. 1"),
    "NaN scales": ("gptq", _changed("scales", _filled(float("nan"))), "NaN or Inf"),
    "a zero point of nothing": ("gptq", _changed("qzeros", _filled(-1)), "all ones"),
    "AWQ's other layout": ("awq", _config(version="gemv"), "version 'gemv'"),
    "AWQ without a layout": ("awq", lambda f: f.config["quantization_config"].pop("version"), "no version"),
    "AWQ of uneven groups": ("awq", _config(group_size=48), "groups of 48"),
    "AWQ without zero points": ("awq", _without("qzeros"), "without its qzeros"),
    "rotations at run time": ("packed", _config(transform_config={"r1": 1}), "transform_config"),
    "sparse weights": ("packed", _config(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "an unknown layout": ("packed", _config(format="marlin-24"), "format 'marlin-24'"),
    "rounded results": ("packed", _group(output_activations={"num_bits": 8}), "output_activations"),
    "an unknown key of weights": ("packed", _weights(codebook=1), "the key 'codebook'"),
    "weights found at run time": ("packed", _weights(dynamic=True), "dynamic True"),
    "a group that says otherwise": ("packed", _weights(group_size=64), "no group of quantization_config"),
    "a shape that is another": ("packed", _changed("weight_shape", _filled(63)), "weight_shape"),
    "no shape": ("packed", _without("weight_shape"), "without its weight_shape"),
    "zero points that nothing states": (
        "packed-zero-points",
        _weights(symmetric=True),
        "zero points, which no group",
    ),
    "FP8 without scales": ("fp8-blocks", _without("weight_scale_inv"), "without its scales"),
    "FP8 of other blocks": ("fp8-blocks", _config(weight_block_size=[16, 16]), "weight_scale_inv"),
    "FP8 without blocks": ("fp8-blocks", _config(weight_block_size=None), "in blocks, and sizes None"),
    "another FP8": ("fp8-blocks", _config(fmt="e5m2"), "fmt 'e5m2'"),
    "an order that is lost": ("gptq-own-order", _without("g_idx"), "without its g_idx"),
    "an order by groups that is lost": ("packed", _weights(actorder="group"), "without its weight_g_idx"),
    "words of 64 bits": ("gptq", _changed("qweight", torch.Tensor.long), "of type I64, expected I32"),
    "zero points in words of 64 bits": ("gptq", _changed("qzeros", torch.Tensor.long), "of type I64, expected I32"),
    "AWQ in bytes": ("awq", _changed("qweight", lambda t: t.to(torch.int8)), "of type I8, expected I32"),
    "packed words of 64 bits": ("packed", _changed("weight_packed", torch.Tensor.long), "of type I64, expected I32"),
    "FP8 scales as bytes": ("fp8-blocks", _changed("weight_scale_inv", torch.Tensor.byte), "of type U8"),
    "zero points beyond 8 bits": (
        "int8-zero-points",
        _changed("weight_zero_point", lambda t: torch.full_like(t, 300, dtype=torch.int32)),
        "beyond 8 bits",
    ),
    "a weight that is there twice": ("gptq", _also("weight", torch.zeros(64, 64)), "twice"),
    "AWQ's weight there twice": ("awq", _also("weight", torch.zeros(64, 64)), "twice"),
    "no words at all": (
        "gptq",
        lambda f: [_changed(n, lambda t: t[:0])(f) for n in ("qweight", "qzeros", "scales")],
        "at least one word",
    ),
    "zero points that sym denies": ("gptq", _config(sym=True), "sym true"),
    "AWQ's zero points that zero_point denies": ("awq", _config(zero_point=False), "without zero points"),
    "one FP8 scale of a matrix in blocks": (
        "fp8-blocks",
        _changed("weight_scale_inv", lambda t: t.reshape(-1)[:1]),
        "a scale for each block of 32 x 48",
    ),
    "FP8 that is said to be integers": ("compressed-fp8", _weights(type="int"), "in FP8, which no group"),
    "an order without groups": (
        "packed",
        lambda f: (_weights(actorder="group")(f), _no_groups(f)),
        "groups of uneven sizes",
    ),
    "a method that is a list": ("gptq", _config(quant_method=["gptq"]), "quant_method ['gptq']"),
    "a group size beyond all": ("gptq", _config(group_size=10**30), "group_size"),
    "tables of codes": ("gptq", _config(quant_method="bitsandbytes"), "codes look up in tables"),
    "an unknown method": ("gptq", _config(quant_method="later"), "quant_method 'later'"),
    "no table": ("gptq", lambda f: f.config.update(quantization_config="gptq"), "no table"),
    "nothing quantised": (
        "gptq",
        lambda f: [f.tensors.pop(n) for n in list(f.tensors) if n.endswith(("qweight", "qzeros", "scales", "g_idx"))],
        "no quantised tensor",
    ),
    "integers without a table": ("gptq", lambda f: f.config.pop("quantization_config"), "no quantization_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(case: str, tmp_path: Path) -> None:
    kind, change, expected = REFUSED[case]
    folder, bundle = made(tmp_path / "model", kind), tmp_path / "bundle"
    change(folder)
    folder.write()
    run_cli("export", folder.path, "-o", bundle, "--window", "12").refusal(expected)
    assert not bundle.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "gptq")
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    run_cli("export", folder.path, "-o", tmp_path / "bundle").refusal("cut short")
    assert not (tmp_path / "bundle").exists()


def test_inspect_names_what_an_export_would_refuse(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "gptq")
    assert "nothing that was read would be refused" in run_cli("inspect", folder.path).succeeded().out
    _without("scales")(folder)
    folder.write()
    assert "without its scales" in (shown := run_cli("inspect", folder.path)).out + shown.err


def test_scales_for_inputs_and_caches_are_left_aside(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", "fp8-blocks")
    for name in ("self_attn.q_proj.input_scale", "self_attn.k_scale", "self_attn.v_scale"):
        folder.tensors[f"model.layers.0.{name}"] = torch.tensor(1.0)
    folder.write()
    load_model(str(folder.path))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_gptq_saves_for_every_matrix(value: float, tmp_path: Path) -> None:
    """Zeros where the model has none change nothing; numbers there would."""
    folder = made(tmp_path / "model", "gptq")
    folder.tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(q.FEED_FORWARD)
    folder.tensors["model.layers.0.mlp.up_proj.bias"] = torch.full((q.FEED_FORWARD,), value)
    folder.write()
    done = run_cli("export", folder.path, "-o", tmp_path / "bundle", "--window", "12", "--target", "onnx")
    if value:
        done.refusal("1 unexpected", "model.layers.0.mlp.up_proj.bias")
    else:
        done.succeeded()


@pytest.mark.parametrize("kind", ["gptq", "gptq-own-order", "packed"])
def test_the_check_of_weights_allows_no_step(kind: str, tmp_path: Path) -> None:
    """A file whose integers are all one step off those in the graph is another file."""
    folder = made(tmp_path / "model", kind)
    loaded = load_model(str(folder.path))
    suffix = "weight_packed" if kind == "packed" else "qweight"
    for name in [name for name in folder.tensors if name.endswith(suffix)]:
        folder.tensors[name] = folder.tensors[name] ^ 0x11111111
    folder.path = tmp_path / "other"
    other = locate(str(folder.write()))
    config = ExportConfig(**GEOMETRY, recipe=load_recipe("stored"))
    with refused("weights"):
        export_loaded(LoadedModel(loaded.model, None, "tiny", other), tmp_path / "bundle", config)


# --- what others read of the same tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed", "packed-zero-points", "packed-8", "packed-2", "int8", "int8-zero-points"])
def test_compressed_tensors_reads_the_same(kind: str, tmp_path: Path) -> None:
    """Its own decompression, with scales in float32, in which no product is rounded."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folder = made(tmp_path / "model", kind)
    facts = folder.config["quantization_config"]
    scheme = QuantizationScheme(**facts["config_groups"]["group_0"])
    compressor = BaseCompressor.load_from_registry(facts["format"])
    parameters = dict(load_model(str(folder.path)).model.named_parameters())
    for name in folder.weights:
        base = name.removesuffix("weight")
        parts = {n.removeprefix(base): t for n, t in folder.tensors.items() if n.startswith(base)}
        parts["weight_scale"] = parts["weight_scale"].float()
        found = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(found, parameters[name]), name


def test_transformers_reads_the_same_fp8(tmp_path: Path) -> None:
    """Blocks that divide the matrix, as its own code wants."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    pack, facts = q.fp8(blocks=(32, 32))
    folder = quantized_folder(tmp_path / "model", pack, facts)
    parameters = dict(load_model(str(folder.path)).model.named_parameters())
    for name in folder.weights:
        scales = folder.tensors[f"{name}_scale_inv"]
        found = Fp8Dequantize(None)._dequantize_one(folder.tensors[name], scales, torch.float32)
        assert torch.equal(found, parameters[name]), name


def test_transformers_reads_the_same_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: experts in FP4, which the export dequantises."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}
    pack, _ = KINDS["gptq"]
    folder = quantized_folder(
        tmp_path / "model", pack, {"quant_method": "mxfp4"}, never=True, model_type="gpt_oss", pad_token_id=0, **sizes
    )
    random, wanted = torch.Generator().manual_seed(0), {}
    for name in [name for name in folder.tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, depth, width = folder.tensors.pop(name).shape
        blocks = torch.randint(0, 256, (count, width, depth // 32, 16), generator=random).to(torch.uint8)
        scales = torch.randint(118, 124, (count, width, depth // 32), generator=random).to(torch.uint8)
        folder.tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    folder.write()
    parameters = dict(load_model(str(folder.path)).model.named_parameters())
    assert len(wanted) == 4
    for name, values in wanted.items():
        assert torch.equal(parameters[name], values), name
    manifest = export(str(folder.path), tmp_path / "bundle", ExportConfig(**GEOMETRY | {"window_size": 8}))
    assert manifest.producer[STORED] == "4 x MXFP4 dequantised"
    del folder.tensors[f"{next(iter(wanted))}_scales"]
    folder.write()
    with refused("without", "_scales"):
        load_model(str(folder.path))
