"""Memory that decoding takes (weights, cache and the values of a run) before a byte of it is allocated.

For a bundle, everything is read from its files. For a model that is not exported, the configuration is enough: weights
are counted on a model without storage, values of a run are estimated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkrt.contract import DTYPE_BYTES, RECURRENT_KINDS, Manifest
from sinkrt.errors import UsageError, problem

from sinkexport.config import WEIGHT_DTYPES, ExportConfig
from sinkexport.targets import ONNX

SCALE_BYTES = 4
"""Bytes of a scale: a quantised matrix has one for each output, a quantised table one for each row."""

INT8_WINDOW_SCALE_BYTES = 2
LIVE_HIDDEN, LIVE_MLP = 4, 2
"""Values of a token that are alive at once: residual, norm and two more of hidden size; gate and up of the MLP."""


@dataclasses.dataclass(frozen=True)
class DecodeMemory:
    """Bytes that decoding takes. recurrent: states of layers without a cache, and those beside one.
    values: intermediate results alive at once, of a step or a chunk: the larger.
    """

    weights: int
    sinks: int
    window: int
    values: int
    recurrent: int = 0

    @property
    def total(self) -> int:
        """Bytes that decoding holds, however long the stream. A runtime's code and CUDA's context come on top."""
        return self.weights + self.sinks + self.window + self.recurrent + self.values


def bundle_memory(bundle: Path, manifest: Manifest) -> DecodeMemory:
    """Read the memory off the manifest and the shapes in the graphs. Each engine holds the weights.

    Raises: BundleError if a graph cannot be read.
    """
    engines = manifest.engines or {}
    sinks = sum(state.nbytes for state in manifest.states if state.kind.startswith("sink"))
    recurrent = sum(state.nbytes for state in manifest.states if state.kind in RECURRENT_KINDS)
    return DecodeMemory(
        weights=sum(facts.bytes for facts in engines.values()) if engines else manifest.weights_bytes,
        sinks=sinks,
        window=manifest.state_bytes - sinks - recurrent,
        values=max(live_bytes(bundle / graph.file, manifest) for graph in manifest.graphs.values()),
        recurrent=recurrent,
    )


def live_bytes(graph_file: Path, manifest: Manifest) -> int:
    """Compute the most bytes of intermediate results alive at once in one run, nodes in the graph's order.

    Outputs count, states do not: they have buffers of their own. Runtimes reuse memory less tightly, and fuse nodes.
    """
    import onnx

    graph = onnx.load(str(graph_file), load_external_data=False).graph
    sizes = {value.name: _nbytes(value) for value in [*graph.value_info, *graph.output]}
    for state in manifest.states:
        sizes.pop(state.output, None)
    last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
    outputs = {value.name for value in graph.output}
    live: dict[str, int] = {}
    now = most = 0
    for i, node in enumerate(graph.node):
        for name in node.output:
            if name in sizes:
                live[name] = sizes[name]
                now += sizes[name]
        most = max(most, now)
        for name in {*node.input, *node.output}:
            if name in live and name not in outputs and last_use.get(name, i) <= i:
                now -= live.pop(name)
    return most


def _nbytes(value: Any) -> int:
    import onnx

    tensor = value.type.tensor_type
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return math.prod(dim.dim_value for dim in tensor.shape.dim) * itemsize


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a model by its configuration, in elements.

    matrices: of matmuls and embedding tables, each parameter once, as (outputs or rows, inputs).
    others: elements of all other parameters, norms and biases.
    sliding_windows: by layer, the tokens that the model itself sees; None: all.
    """

    name: str
    sliding_windows: tuple[int | None, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    matrices: tuple[tuple[int, int], ...]
    others: int

    @classmethod
    def load(cls, source: str) -> ModelShape:
        """Read a folder with config.json (weights are not needed), a .gguf file or a Hub id.

        Raises: UsageError if there is none, the family does not export, or caches are not one of the same size a layer.
        """
        import torch
        import transformers

        from sinkexport.sources import load_config

        config = load_config(source)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        matrices = {
            id(module.weight): (module.weight.shape[0], module.weight.shape[1])
            for module in model.modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
        }
        others = sum(p.numel() for p in model.parameters() if id(p) not in matrices)
        num_q_heads, num_kv_heads, head_dim = _uniform_heads(model, text)
        return cls(
            name=Path(source).resolve().name if Path(source).exists() else source,
            sliding_windows=_sliding_windows(text),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=text.hidden_size,
            intermediate_size=_largest(getattr(text, "intermediate_size", None)) or 4 * text.hidden_size,
            vocab_size=text.vocab_size,
            matrices=tuple(matrices.values()),
            others=others,
        )

    def weight_bytes(self, dtype: str, weights: str) -> int:
        """Count the bytes of weights. weights: ``float``, or ``int8`` as the recipe int8-channel has them."""
        element_bytes = DTYPE_BYTES[WEIGHT_DTYPES[dtype]]
        kept = self.others * element_bytes
        if weights == "float":
            return kept + sum(n * k for n, k in self.matrices) * element_bytes
        return kept + sum(n * k + n * SCALE_BYTES for n, k in self.matrices)

    def memory(
        self, num_sinks: int, window: int, batch: int, chunk: int, *, dtype: str, weights: str = "float", kv: str = "fp"
    ) -> DecodeMemory:
        """Estimate the memory of a bundle exported with these options. num_sinks, window, chunk: tokens."""
        rows = 2 * batch * self.num_kv_heads  # of a layer: keys and values
        config = ExportConfig(num_sinks, window, batch=batch, chunk_size=1, target=ONNX.option)
        rings = [config.ring(sliding_window) for sliding_window in self.sliding_windows]
        kept_sinks, kept_window = sum(r.num_sink_tokens for r in rings), sum(r.window_size for r in rings)
        float_bytes = DTYPE_BYTES[WEIGHT_DTYPES[dtype]]
        per_token = self.head_dim + INT8_WINDOW_SCALE_BYTES if kv == "int8" else self.head_dim * float_bytes
        # Float32 logits of every stream, and of a chunk or a step of all streams the larger of two: hidden values with
        # the MLP's, or attention's logits and weights.
        tokens = max(batch, chunk)
        layer = tokens * (LIVE_HIDDEN * self.hidden_size + LIVE_MLP * self.intermediate_size) * float_bytes
        attention = 2 * tokens * self.num_q_heads * (num_sinks + window + (chunk if chunk > 1 else 0)) * float_bytes
        return DecodeMemory(
            weights=self.weight_bytes(dtype, weights),
            sinks=rows * kept_sinks * self.head_dim * float_bytes,
            window=rows * kept_window * per_token,
            values=4 * batch * self.vocab_size + max(layer, attention),
        )


def _uniform_heads(model: Any, text: Any) -> tuple[int, int, int]:
    """Query heads, key heads and their size, of a model on the device ``meta``.

    They are what its attention is called with. A model that cannot run without weights is believed its configuration.

    Raises: UsageError for a model whose layers do not all have one cache of the same size.
    """
    import torch

    from sinkexport.families.interface import intercept_attention
    from sinkexport.model.experts import static_experts

    sizes: list[tuple[int, int, int, int]] = []

    def record(_module: Any, q: Any, k: Any, v: Any, _mask: Any, **_arguments: Any) -> tuple[Any, None]:
        sizes.append((q.shape[1], k.shape[1], k.shape[-1], v.shape[-1]))
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    if getattr(text, "kv_lora_rank", None):
        raise _uncounted("a model with latent attention")
    if getattr(text, "num_kv_shared_layers", None):
        raise _uncounted("a model whose layers share caches")
    try:
        with torch.no_grad(), static_experts(model), intercept_attention(model, record):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
    except Exception:  # the model's own code, which may look at values that are not there
        sizes = [_configured(model, text)] * text.num_hidden_layers
    if len(sizes) != text.num_hidden_layers or len(set(sizes)) > 1 or sizes[0][2] != sizes[0][3]:
        raise _uncounted("a model whose layers have heads of different sizes, or not one attention each")
    return sizes[0][:3]


def _configured(model: Any, text: Any) -> tuple[int, int, int, int]:
    """Query heads, key heads, sizes of a key and of a value as a configuration has them.

    Raises: UsageError for a model with convolutions, as recurrent layers have, and one whose sizes are no integers.
    """
    import torch

    heads, size = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        raise _uncounted("a model with recurrent layers")
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)):
        raise _uncounted("a model whose configuration does not say its heads")
    head_dim = getattr(text, "head_dim", None) or size // heads
    return heads, kv_heads, head_dim, getattr(text, "v_head_dim", None) or head_dim


def _largest(sizes: Any) -> int | None:
    """The largest of sizes by layer, or the one of all."""
    return max(sizes) if isinstance(sizes, (list, tuple)) else sizes


def _uncounted(received: str) -> UsageError:
    return UsageError(
        problem(
            "--memory",
            received=received,
            expected="a cache of the same size in every layer",
            fix="export it, then inspect the bundle",
        )
    )


def _sliding_windows(text: Any) -> tuple[int | None, ...]:
    """Read sliding windows by layer from a configuration; the export itself asks the model.

    Raises: UsageError.
    """
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return (window,) * text.num_hidden_layers
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise _uncounted(f"a model with layers of {', '.join(others)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def combinations(windows: Sequence[int]) -> list[tuple[str, str, str, int]]:
    """List (dtype, weights, kv, window) of the rows of a table."""
    kinds = [("fp32", "float", "fp"), ("fp16", "float", "fp"), ("fp16", "int8", "fp"), ("fp16", "int8", "int8")]
    return [(*kind, window) for kind in kinds for window in windows]
