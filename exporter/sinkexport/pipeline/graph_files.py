"""The graphs of a bundle and their files: the second is built while the first one's weights are written and hashed."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import onnx_ir as ir
from sinkrt.contract import AttentionCache, FileFacts, GraphSpec, ModelFacts, StateSpec, hash_file
from sinkrt.contract.constants import LAYOUT_METADATA, VERIFY
from sinkrt.contract.layout import layout_text

from sinkexport.config import WEIGHT_DTYPES, ExportConfig, target_of
from sinkexport.families.refusals import refusing
from sinkexport.graph.convert import WEIGHTS_FILE, BuiltGraph, build_graph
from sinkexport.graph.cpu_nodes import has_other_matmuls
from sinkexport.graph.quantize.plan import Plan
from sinkexport.graph.trace_graph import traced_graph
from sinkexport.model.decoder import StreamStep
from sinkexport.pipeline.bundle_writer import write_graph, write_graph_with_weights_of
from sinkexport.pipeline.manifest_facts import attention_caches, model_facts
from sinkexport.pipeline.probed import Probed
from sinkexport.sources import LoadedModel
from sinkexport.targets import ONNX
from sinkexport.util.derived_constant import DerivedConstant
from sinkexport.util.progress import Report

PlanOf = Callable[..., Plan]
"""Arguments as `RecipePlan`'s."""

DECODE_FILE, PREFILL_FILE, VERIFY_FILE = "decode.onnx", "prefill.onnx", "verify.onnx"

FILES = {"prefill": PREFILL_FILE, VERIFY: VERIFY_FILE}


@dataclasses.dataclass(frozen=True)
class GraphFiles:
    """Graphs of a bundle that are on the disk. num_tokens: T of the prefill graph; 1: there is none.

    model, attention: what the manifest and the graphs' metadata say of the model and its caches.
    derived: constants of the graphs that the model's code computes of its parameters.
    hashes: of files that are hashed already.
    """

    graphs: Mapping[str, GraphSpec]
    states: tuple[StateSpec, ...]
    model: ModelFacts
    attention: tuple[AttentionCache, ...] | None
    num_tokens: int
    derived: tuple[DerivedConstant, ...]
    hashes: Mapping[str, FileFacts]


def write_graphs(
    stage: Path,
    loaded: LoadedModel,
    config: ExportConfig,
    probed: Probed,
    report: Report,
    plan_of: PlanOf,
    special_ids: tuple[int | None, tuple[int, ...]],
) -> GraphFiles:
    """Build and write the decode graph, the prefill graph where chunks have more than one token, and that of drafts."""
    report("decode", 0, 1)
    built, derived = _build(loaded, config, probed, "decode", config.batch, 1, plan_of)
    facts = model_facts(loaded, probed.shape, probed.rotary, special_ids, vocab_size=built.outputs[0].shape[-1])
    attention = attention_caches(facts, probed.caches)
    layout = layout_text(facts, config.num_sink_tokens, config.window_size, attention)
    metadata = {} if layout is None else {LAYOUT_METADATA: layout}
    built.model.metadata_props.update(metadata)
    graphs = {"decode": built.spec(DECODE_FILE)}
    num_tokens = min([_chunk_size(config, built), *(ring.window_size for ring in probed.rings)])
    others: dict[str, BuiltGraph] = {}
    with _beside(built.model, stage, report) as written:
        if num_tokens > 1:
            report("prefill", 0, 1)
            # Of one stream: a long prompt then costs the other streams nothing.
            others["prefill"], more = _build(loaded, config, probed, "prefill", 1, num_tokens, plan_of)
            derived += more
        if config.speculate is not None:
            report("drafts", 0, 1)
            others[VERIFY], more = _build(loaded, config, probed, VERIFY, config.batch, 1 + config.speculate, plan_of)
            derived += more
        hashes = written()
    for role, other in others.items():
        graphs[role] = other.spec(FILES[role])
        other.model.metadata_props.update(metadata)
        write_graph_with_weights_of(other.model, stage, FILES[role], DECODE_FILE)
    for graph in graphs.values():
        onnx.checker.check_model(stage / graph.file)
    return GraphFiles(
        graphs=graphs,
        states=built.states,
        model=facts,
        attention=attention,
        num_tokens=num_tokens,
        derived=tuple(derived),
        hashes=hashes,
    )


def _chunk_size(config: ExportConfig, decode: BuiltGraph) -> int:
    """T as far as the window allows it. A short prompt costs a whole chunk where the CPU library does not do it all."""
    size = config.num_tokens_per_chunk
    if config.chunk_size is None and target_of(config).has_cpu_library and has_other_matmuls(decode.model.graph):
        return min(size, ONNX.chunk_size)
    return size


@contextlib.contextmanager
def _beside(model: ir.Model, stage: Path, report: Report) -> Iterator[Callable[[], Mapping[str, FileFacts]]]:
    """Write the decode graph and its weights beside what is done inside: files and their hashes leave the interpreter.

    Yields: waits until the weights are written, and gives what is known of their file.
    """
    is_awaited = threading.Event()

    def show(done: int, total: int) -> None:
        if is_awaited.is_set():
            report("write", done, total)

    def write() -> Mapping[str, FileFacts]:
        write_graph(model, stage, DECODE_FILE, show)
        weights = stage / WEIGHTS_FILE
        return {WEIGHTS_FILE: hash_file(weights)} if weights.is_file() else {}

    with ThreadPoolExecutor(max_workers=1) as pool:
        written = pool.submit(write)

        def wait() -> Mapping[str, FileFacts]:
            report("write", 0, 1)
            is_awaited.set()
            return written.result()

        yield wait


def _build(
    loaded: LoadedModel,
    config: ExportConfig,
    probed: Probed,
    role: str,
    batch: int,
    num_tokens: int,
    plan_of: PlanOf,
) -> tuple[BuiltGraph, list[DerivedConstant]]:
    """Trace and convert one graph of B streams and T = num_tokens tokens, and what it computes of parameters."""
    step = StreamStep(
        loaded.model,
        config,
        probed.shape,
        probed.rotary,
        batch=batch,
        num_tokens=num_tokens,
        all_logits=role == VERIFY,
    ).eval()
    recipe, dtype = config.recipe, WEIGHT_DTYPES[config.dtype]
    plan = (
        None if recipe is None or recipe.stored == "float" else plan_of(recipe, loaded.model, dtype, config.calibration)
    )
    num_sinks = 0 if config.calibration is None else config.calibration.num_sink_tokens
    model, derived = traced_graph(step, role)
    with refusing(loaded.model, f"converting the {role} graph to ONNX"):
        return build_graph(model, role, step.state_names, target_of(config), num_sinks, plan), derived
