"""A tiny bundle built by hand: no torch, no exporter, yet all that a runtime meets in a real one.

One layer of sink attention in standard opset-24 operators (TensorScatter for the window, Where for the sinks),
without rotation, so that the same stream is a few lines of NumPy over a list of all tokens (`reference_logits`).
The tokenizer is byte-level: every byte is a token, so that characters span up to four tokens.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from sinkrt.contract import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileFacts,
    GraphSpec,
    Manifest,
    ModelFacts,
    StateSpec,
    StreamFacts,
    TensorSpec,
    TokenizerFacts,
    hash_file,
)
from sinkrt.ring import POSITION_LIMIT
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.support import random_ids

BOS, EOS = 256, 257
VOCAB_SIZE = 258
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_ONNX_DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


@dataclasses.dataclass(frozen=True)
class Toy:
    """Geometry of a toy: S, W, B, query and key heads, head size D, chunk size T. `seed` draws the weights."""

    num_sink_tokens: int = 2
    window_size: int = 6
    batch: int = 1
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    seed: int = 0
    position_limit: int = POSITION_LIMIT
    chunk_size: int = 1

    @property
    def capacity(self) -> int:
        return self.num_sink_tokens + self.window_size

    def weights(self) -> dict[str, np.ndarray]:
        """float32 matrices: embedding [V, E], wq [E, E], wk and wv [E, Hkv*D], head [E, V]."""
        random = np.random.default_rng(self.seed)
        width, kv_width = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "embedding": (VOCAB_SIZE, width),
            "wq": (width, width),
            "wk": (width, kv_width),
            "wv": (width, kv_width),
            "head": (width, VOCAB_SIZE),
        }
        return {
            name: (random.standard_normal(shape) / np.sqrt(shape[0] if name != "embedding" else 1)).astype(np.float32)
            for name, shape in shapes.items()
        }


def toy_ids(*shape: int, seed: int = 1) -> np.ndarray:
    """int64 ids of the toy's vocabulary."""
    return random_ids(*shape, seed=seed, vocab_size=VOCAB_SIZE, first=0)


def reference_logits(toy: Toy, ids: list[int]) -> np.ndarray:
    """float64 [N, V] logits of one stream: attention over the first S and last W tokens of a list of all of them."""
    w = {name: value.astype(np.float64) for name, value in toy.weights().items()}
    groups, dim = toy.num_q_heads // toy.num_kv_heads, toy.head_dim
    x = w["embedding"][ids]  # [N, E]
    q = (x @ w["wq"]).reshape(len(ids), toy.num_q_heads, dim)
    k = np.repeat((x @ w["wk"]).reshape(len(ids), toy.num_kv_heads, dim), groups, axis=1)  # [N, Hq, D]
    v = np.repeat((x @ w["wv"]).reshape(len(ids), toy.num_kv_heads, dim), groups, axis=1)
    rows = []
    for t in range(len(ids)):
        sinks = list(range(min(t + 1, toy.num_sink_tokens)))
        window = list(range(max(toy.num_sink_tokens, t + 1 - toy.window_size), t + 1))
        kept = sinks + window
        scores = np.einsum("hd,nhd->hn", q[t], k[kept]) / np.sqrt(dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        attended = np.einsum("hn,nhd->hd", weights, v[kept]).reshape(-1)
        rows.append((x[t] + attended) @ w["head"])
    return np.array(rows)


def build_toy(
    folder: Path,
    toy: Toy | None = None,
    *,
    tokenizer: bool = True,
    chat: bool = True,
    template: str = CHAT_TEMPLATE,
) -> Path:
    """Write a bundle and return its folder."""
    toy = toy or Toy()
    folder.mkdir(parents=True, exist_ok=True)
    for role, location in (("decode", "weights.bin"), ("prefill", "weights_prefill.bin")):
        if role == "prefill" and toy.chunk_size == 1:
            continue
        onnx.save(
            _model(toy, role),
            folder / f"{role}.onnx",
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=location,
            size_threshold=1024,  # shapes and other small constants must stay in the graph
        )
    if tokenizer:
        toy_tokenizer().save(str(folder / "tokenizer.json"))
        if chat:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    facts = TokenizerFacts("tokenizer.json", "chat_template.jinja" if chat else None) if tokenizer else None
    write_manifest(folder, toy_manifest(toy, facts, {f.name: hash_file(f) for f in _bundle_files(folder)}))
    return folder


def rehash(folder: Path) -> None:
    """Bring the manifest's file list up to date after a test has changed a file on purpose."""
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    files = {f.name: hash_file(f) for f in _bundle_files(folder)}
    write_manifest(folder, dataclasses.replace(manifest, files=files))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")


def toy_manifest(toy: Toy, tokenizer: TokenizerFacts | None, files: dict[str, FileFacts]) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        target="onnx",
        weights_dtype="float32",
        model=ModelFacts(
            name="toy",
            architecture="ToyForCausalLM",
            family="toy",
            num_layers=1,
            num_q_heads=toy.num_q_heads,
            num_kv_heads=toy.num_kv_heads,
            head_dim=toy.head_dim,
            hidden_size=toy.num_q_heads * toy.head_dim,
            vocab_size=VOCAB_SIZE,
            num_parameters=sum(w.size for w in toy.weights().values()),
            position_scheme="none",
            bos_token_id=BOS,
            eos_token_ids=(EOS,),
        ),
        stream=StreamFacts(toy.num_sink_tokens, toy.window_size, toy.batch, toy.chunk_size, toy.position_limit),
        graphs={
            role: dataclasses.replace(_graph_spec(toy, role), weight_bytes=_weight_bytes(toy, role))
            for role in ("decode", "prefill")[: 1 + (toy.chunk_size > 1)]
        },
        states=tuple(
            StateSpec(
                0, kind, f"{kind}.0", f"{kind}.0.next", (toy.batch, toy.num_kv_heads, size, toy.head_dim), "float32"
            )
            for kind, size in _state_sizes(toy)
        ),
        tokenizer=tokenizer,
        files=files,
        producer={"tests": "1"},
    )


def _graph_spec(toy: Toy, role: str) -> GraphSpec:
    batch, num_tokens = (toy.batch, 1) if role == "decode" else (1, toy.chunk_size)
    inputs = [TensorSpec("ids", (batch, num_tokens), "int64"), TensorSpec("position", (batch,), "int64")]
    if role == "prefill":
        inputs.append(TensorSpec("num_valid", (batch,), "int64"))
    return GraphSpec(f"{role}.onnx", num_tokens, tuple(inputs), (TensorSpec("logits", (batch, VOCAB_SIZE), "float32"),))


def _weight_bytes(toy: Toy, role: str) -> int:
    """All constants but the table that is only gathered from."""
    constants = _model(toy, role).graph.initializer
    return sum(numpy_helper.to_array(value).nbytes for value in constants if value.name != "embedding")


def toy_tokenizer() -> tokenizers.Tokenizer:
    """Bytes 0..255 as tokens 0..255, then BOS and EOS, which are special."""
    # A byte-level vocabulary names bytes by printable characters; sorting them by byte gives ids = bytes.
    names = {_byte_name(byte): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    return tokenizer


def _byte_name(byte: int) -> str:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def _bundle_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.name != MANIFEST_NAME)


def _state_sizes(toy: Toy) -> list[tuple[str, int]]:
    sinks = [("sink_k", toy.num_sink_tokens), ("sink_v", toy.num_sink_tokens)] if toy.num_sink_tokens else []
    return [*sinks, ("window_k", toy.window_size), ("window_v", toy.window_size)]


class _Graph:
    """Collects nodes and constants; each call of `add` returns the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: object, dtype: type = np.int64, name: str = "") -> str:
        name = name or f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name


def _model(toy: Toy, role: str) -> onnx.ModelProto:
    """decode: one token of each stream. prefill: T tokens of one stream, one after the other as decode does them."""
    g = _Graph()
    for name, weight in toy.weights().items():
        g.constant(weight, np.float32, name)
    spec = _graph_spec(toy, role)
    batch = spec.inputs[0].shape[0]
    kinds = [kind for kind, _ in _state_sizes(toy)]
    states = {kind: f"{kind}.0" for kind in kinds}
    if role == "decode":
        logits, after = _step(g, toy, batch, "ids", "position", states)
    else:
        logits, after = g.constant(np.zeros((1, VOCAB_SIZE)), np.float32), states
        for i in range(toy.chunk_size):
            token = g.add("Gather", "ids", g.constant([i]), axis=1)
            position = g.add("Add", "position", g.constant(i))
            new_logits, new = _step(g, toy, batch, token, position, after)
            counts = g.add("Less", g.constant([i]), "num_valid")  # [1]
            logits = g.add("Where", counts, new_logits, logits)
            after = {kind: g.add("Where", counts, new[kind], after[kind]) for kind in kinds}
    for kind in kinds:
        g.add("Identity", after[kind], output=f"{kind}.0.next")
    g.add("Identity", logits, output="logits")
    sizes = {f"{kind}.0": (batch, toy.num_kv_heads, size, toy.head_dim) for kind, size in _state_sizes(toy)}
    graph = helper.make_graph(
        g.nodes,
        "toy",
        [_value_info(s) for s in (*spec.inputs, *(TensorSpec(n, shape, "float32") for n, shape in sizes.items()))],
        [_value_info(s) for s in (*spec.outputs, *(TensorSpec(f"{n}.next", x, "float32") for n, x in sizes.items()))],
        g.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _step(
    g: _Graph, toy: Toy, batch: int, ids: str, position: str, states: dict[str, str]
) -> tuple[str, dict[str, str]]:
    """One token [B, 1] of each stream: logits [B, V] and the states afterwards."""
    sinks, window, dim = toy.num_sink_tokens, toy.window_size, toy.head_dim
    groups = toy.num_q_heads // toy.num_kv_heads
    x = g.add("Gather", "embedding", ids)  # [B, 1, E]
    # Query heads of one key head become rows of one matrix: [B, Hkv, G, D].
    q = g.add("Reshape", g.add("MatMul", x, "wq"), g.constant([batch, toy.num_kv_heads, groups, dim]))
    q = g.add("Mul", q, g.constant(1 / np.sqrt(dim), np.float32))
    k, v = (
        g.add("Reshape", g.add("MatMul", x, name), g.constant([batch, toy.num_kv_heads, 1, dim]))  # [B, Hkv, 1, D]
        for name in ("wk", "wv")
    )

    after_sinks = g.add("Sub", position, g.constant(sinks))  # [B]
    slot = g.add("Mod", after_sinks, g.constant(window))  # floor: 0 .. W-1 while t < S too
    after, valid = {}, []
    t = g.add("Reshape", position, g.constant([batch, 1, 1, 1]))
    if sinks:
        index = g.constant(np.arange(sinks).reshape(1, 1, sinks, 1))
        here = g.add("Equal", index, t)  # [B, 1, S, 1]
        after["sink_k"] = g.add("Where", here, k, states["sink_k"])
        after["sink_v"] = g.add("Where", here, v, states["sink_v"])
        valid.append(g.add("LessOrEqual", g.constant(np.arange(sinks).reshape(1, 1, 1, sinks)), t))
    after["window_k"] = g.add("TensorScatter", states["window_k"], k, slot, axis=2, mode="linear")
    after["window_v"] = g.add("TensorScatter", states["window_v"], v, slot, axis=2, mode="linear")
    count = g.add("Add", g.add("Reshape", after_sinks, g.constant([batch, 1, 1, 1])), g.constant(1))
    valid.append(g.add("Less", g.constant(np.arange(window).reshape(1, 1, 1, window)), count))  # [B, 1, 1, W]

    key = g.add("Concat", *(after[kind] for kind in after if kind.endswith("k")), axis=2)  # [B, Hkv, C, D]
    value = g.add("Concat", *(after[kind] for kind in after if kind.endswith("v")), axis=2)
    scores = g.add("MatMul", q, g.add("Transpose", key, perm=[0, 1, 3, 2]))  # [B, Hkv, G, C]
    scores = g.add("Where", g.add("Concat", *valid, axis=3), scores, g.constant(-1e9, np.float32))
    attended = g.add("MatMul", g.add("Softmax", scores, axis=-1), value)  # [B, Hkv, G, D]
    flat = g.add("Reshape", attended, g.constant([batch, 1, toy.num_q_heads * dim]))
    logits = g.add("MatMul", g.add("Add", x, flat), "head")  # [B, 1, V]
    return g.add("Reshape", logits, g.constant([batch, VOCAB_SIZE])), after


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _ONNX_DTYPES[spec.dtype], list(spec.shape))
