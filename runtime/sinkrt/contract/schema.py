"""Parts of the manifest: one frozen dataclass for each JSON object in it.

Each field has a `Rule` (`sinkrt.contract.rules`): its documentation and the values that it may have. The C++ runtime's
structs and readers are generated from these classes, so a new field is written here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from sinkrt.contract.constants import (
    ACTIVATION_KINDS,
    ALL_KINDS,
    DTYPE_BYTES,
    FLAVOURS,
    FLOAT_DTYPES,
    MAX_RANK,
    MAX_TENSOR_BYTES,
    WEIGHT_KINDS,
    WINDOW_KINDS,
)
from sinkrt.contract.rules import about, check_rules, is_plain, require
from sinkrt.ring import POSITION_LIMIT


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output."""

    name: str = field(metadata=about("its name in the graph"))
    shape: tuple[int, ...] = field(metadata=about("static, every axis >= 1"))
    dtype: str = field(metadata=about("a key of `DTYPE_BYTES`"))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        require(bool(self.name), "tensor name", "''", "a name")
        require(is_plain(self.name), "tensor name", repr(self.name), "text without control characters")
        rank, what = len(self.shape), f"shape of '{self.name}'"
        require(rank <= MAX_RANK, what, f"{rank} axes", f"at most {MAX_RANK}")
        require(all(n >= 1 for n in self.shape), what, self.shape, "every axis >= 1")
        require(self.dtype in DTYPE_BYTES, f"dtype of '{self.name}'", self.dtype, " | ".join(DTYPE_BYTES))
        require(self.nbytes <= MAX_TENSOR_BYTES, what, self.shape, "at most 2^46 bytes")

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = DTYPE_BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class StateSpec:
    """One state tensor of one layer: `input` and `output` must be bound to the same buffer.

    Kinds ``sink_k | sink_v`` have the shape [B, Hkv, S, D], and ``window_k | window_v`` have [B, Hkv, W, D]. Where the
    window is int8 there are ``window_k_scale | window_v_scale`` of shape [B, Hkv, W], one for each head and token. A
    layer whose sliding window is smaller than S + W has that window for W, and no sinks. Hkv and D are the cache's own
    (`AttentionCache`), and a latent cache has no ``_v``. ``attention_mass`` of
    shape [B, Hq, 2, W] has sums for `ActTuning`, after the last token at an even and at an odd position. So a step
    reads what the token before it left, and can be repeated. A recurrence has ``conv | recurrent``, of any shape
    [B, ..] and any number, in a layer with or without a cache. All states are zero where a stream begins.
    """

    _LABEL: ClassVar[str] = "state {}"

    layer: int = field(metadata=about("index of the layer", least=0))
    kind: str = field(metadata=about("what it holds", one_of=ALL_KINDS))
    input: str = field(metadata=about("its name among the graph's inputs"))
    output: str = field(metadata=about("its name among the graph's outputs"))
    shape: tuple[int, ...] = field(metadata=about("[B, ..]"))
    dtype: str = field(metadata=about("a key of `DTYPE_BYTES`"))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        require(self.input != self.output, "state output name", self.output, "a name other than the input's")
        TensorSpec(self.input, self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return TensorSpec(self.input, self.shape, self.dtype).nbytes


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph. `inputs` and `outputs` leave the states out: `Manifest.states` lists those."""

    _LABEL: ClassVar[str] = "graph {}"

    file: str = field(metadata=about("path inside the bundle"))
    num_tokens: int = field(metadata=about("T, tokens of each stream in one run", least=1))
    inputs: tuple[TensorSpec, ...] = field(metadata=about("inputs that are no states"))
    outputs: tuple[TensorSpec, ...] = field(metadata=about("outputs that are no states"))
    weight_bytes: int | None = field(
        default=None, metadata=about("bytes of weights that one run reads; None: made before schema 6", least=0)
    )

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class ModelFacts:
    """What the bundle was made from. Counts have no unit."""

    _LABEL: ClassVar[str] = "model.{}"

    name: str = field(metadata=about("name of the source"))
    architecture: str = field(metadata=about("name of transformers' class"))
    family: str = field(metadata=about("transformers' model_type"))
    num_layers: int = field(metadata=about("decoder layers", least=1))
    num_q_heads: int = field(metadata=about("query heads of a layer, a multiple of num_kv_heads; 0: none", least=0))
    num_kv_heads: int = field(metadata=about("key and value heads of a layer; 0: no attention", least=0))
    head_dim: int = field(metadata=about("elements of a head; 0: no attention", least=0))
    hidden_size: int = field(metadata=about("elements of a hidden state", least=1))
    vocab_size: int = field(metadata=about("logits of a token", least=1))
    num_parameters: int = field(metadata=about("parameters of the model"))
    position_scheme: str = field(metadata=about("how positions enter attention"))
    bos_token_id: int | None = field(metadata=about("token that begins a text; None: there is none"))
    eos_token_ids: tuple[int, ...] = field(metadata=about("tokens that end a text"))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        check_heads("model", self.num_q_heads, self.num_kv_heads)
        has_attention = self.num_q_heads > 0
        expected = ">= 1, as there are query heads" if has_attention else "0, as there are no query heads"
        require((self.head_dim > 0) == has_attention, "model.head_dim", self.head_dim, expected)


@dataclass(frozen=True)
class AttentionCache:
    """Sizes of one cache: what one attention call of a layer keeps.

    A latent cache has one row a token, for keys and values alike: the values are the row's last `value_dim` elements.
    Its states are ``sink_k | window_k`` alone. Where the window is int8, ``window_k_scale`` is that of the other
    elements, which turn, and ``window_v_scale`` that of the values.
    """

    _LABEL: ClassVar[str] = "attention.{}"

    layer: int = field(metadata=about("index of the layer", least=0))
    call: int = field(metadata=about("number of the call among those of its layer", least=0))
    num_q_heads: int = field(metadata=about("query heads, a multiple of num_kv_heads", least=1))
    num_kv_heads: int = field(metadata=about("key and value heads", least=1))
    key_dim: int = field(metadata=about("elements of a key", least=1))
    value_dim: int = field(metadata=about("elements of a value", least=1))
    latent: bool = field(metadata=about("whether values are a part of the keys' rows (MLA)"))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        check_heads("attention", self.num_q_heads, self.num_kv_heads)
        if self.latent:
            require(self.num_kv_heads == 1, "attention.num_kv_heads", self.num_kv_heads, "1 in a latent cache")
            fits = self.value_dim <= self.key_dim
            require(fits, "attention.value_dim", self.value_dim, f"at most key_dim={self.key_dim} in a latent cache")

    @property
    def suffix(self) -> str:
        """What its states have behind ``<kind>.``: the layer, and the call unless it is the first."""
        return f"{self.layer}.call{self.call}" if self.call else f"{self.layer}"


def check_heads(where: str, num_q_heads: int, num_kv_heads: int) -> None:
    """Raise BundleError unless query heads are a multiple of key heads; none is one of none."""
    ok = num_q_heads > 0 and num_q_heads % num_kv_heads == 0 if num_kv_heads > 0 else num_q_heads == 0
    expected = f"a multiple of num_kv_heads={num_kv_heads}" if num_kv_heads else "0, as num_kv_heads is"
    require(ok, f"{where}.num_q_heads", num_q_heads, expected)


@dataclass(frozen=True)
class StreamFacts:
    """Geometry of the cache, in tokens.

    In a model without attention, S and W mean nothing but the longest chunk (W) and the number of recent ids (S + W).
    """

    _LABEL: ClassVar[str] = "stream.{}"

    num_sink_tokens: int = field(metadata=about("S, first tokens of a stream, which stay", least=0))
    window_size: int = field(metadata=about("W, latest tokens, which are kept beside the sinks", least=1))
    batch: int = field(metadata=about("B, streams decoded together", least=1))
    chunk_size: int = field(metadata=about("T of the prefill graph; 1: there is none"))
    position_limit: int = field(metadata=about("first stream position that the graph's integer phase cannot take"))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        window, limit = self.window_size, self.position_limit
        require(self.batch * self.capacity <= POSITION_LIMIT, "stream.batch", self.batch, "2^47 tokens in all caches")
        require(1 <= limit <= POSITION_LIMIT, "stream.position_limit", limit, "1 .. 2^47")
        is_chunk = 1 <= self.chunk_size <= window
        require(is_chunk, "stream.chunk_size", self.chunk_size, f"1 .. window_size={window}")

    @property
    def capacity(self) -> int:
        """C = S + W, tokens."""
        return self.num_sink_tokens + self.window_size


@dataclass(frozen=True)
class TokenizerFacts:
    """Tokenizer files inside the bundle."""

    _LABEL: ClassVar[str] = "tokenizer file"

    file: str = field(metadata=about("path of tokenizer.json", is_path=True))
    chat_template: str | None = field(metadata=about("path of a Jinja file; None: there is none", is_path=True))

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class FileFacts:
    """Size and SHA-256 of one file of the bundle."""

    bytes: int = field(metadata=about("size", least=0, label="file size", unit=" bytes"))
    sha256: str = field(metadata=about("64 hex digits", is_digest=True, label="file sha256"))

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class Quantization:
    """How a bundle was made small. The recipe's file says all; this is what tools ask for.

    Keys of `thresholds`: ``perplexity_increase`` (0.01: 1%), ``kl_divergence`` (mean, nats) and ``top1_agreement``
    (share), all against floating point.
    """

    _LABEL: ClassVar[str] = "quantization.{}"

    recipe: str = field(metadata=about("name of the recipe"))
    weights: str = field(metadata=about("what weights are stored as", one_of=WEIGHT_KINDS))
    activations: str = field(metadata=about("what matmuls take", one_of=ACTIVATION_KINDS))
    kv: str = field(metadata=about("the window's entries; sinks are never quantised", one_of=WINDOW_KINDS))
    calibration_sha256: str | None = field(metadata=about("of the calibration file (hex); None: none was used"))
    thresholds: Mapping[str, float] = field(metadata=about("what the recipe promises, for `sinkexport verify`"))

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class ActTuning:
    """Scaling of later sinks, whose lost attention goes to the other tokens (ACT, arXiv:2406.15765).

    How much of a sink a token in the window is: its mean attention from the queries since it came, over the same share
    for all cached tokens, is `alpha` >= 1 (none) to 2 * alpha (all), once it has had `min_queries` queries.
    """

    _LABEL: ClassVar[str] = "sink_tuning.act.{}"

    alpha: float = field(metadata=about("share of attention that makes a sink, >= 1"))
    beta: float = field(metadata=about("what a sink's attention is multiplied by, 0 .. 1, 1 excluded"))
    min_queries: int = field(metadata=about("queries before a token is judged", least=1))
    heads: tuple[tuple[bool, ...], ...] = field(metadata=about("[L][Hq], where it is done"))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        require(1 <= self.alpha < math.inf, "sink_tuning.act.alpha", self.alpha, ">= 1")
        require(0 <= self.beta < 1, "sink_tuning.act.beta", self.beta, ">= 0 and < 1")


@dataclass(frozen=True)
class SinkTuning:
    """How attention to sinks was changed, without training. It is in the graphs: a runtime does nothing about it.

    Factors apply to the attention weight of token 0 before it is normalised again (ZeroTuning, arXiv:2505.11739).
    """

    sha256: str = field(metadata=about("of the file that the export was given", is_digest=True, label="file sha256"))
    first_token_scale: tuple[tuple[float, ...], ...] = field(metadata=about("[L][Hq] > 0, factors of token 0"))
    act: ActTuning | None = field(default=None, metadata=about("calibration of later sinks; None: none"))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        smallest = min((factor for layer in self.first_token_scale for factor in layer), default=0.0)
        require(smallest > 0, "sink_tuning.first_token_scale", smallest, "> 0")


@dataclass(frozen=True)
class AffineAttention:
    """How attention weights are scaled and shifted (arXiv:2602.23057). It is in the graphs: a runtime does nothing."""

    sha256: str = field(metadata=about("of the file that the export was given", is_digest=True, label="file sha256"))
    file: str = field(metadata=about("path of its copy inside the bundle"))
    has_inputs: bool = field(metadata=about("whether a scale or a bias depends on the hidden state"))
    heads: tuple[tuple[int, ...], ...] = field(metadata=about("[L], the query heads that are changed"))

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class HeadWindow:
    """Key heads of a layer that keep the last window_size tokens beside the sinks, with the query heads they serve."""

    _LABEL: ClassVar[str] = "head_windows {}"

    layer: int = field(metadata=about("index of the layer", least=0))
    kv_heads: tuple[int, ...] = field(metadata=about("indices of the key heads"))
    window_size: int = field(metadata=about("tokens", least=1))

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        require(len(self.kv_heads) > 0, "head_windows kv_heads", "none", "at least one")


@dataclass(frozen=True)
class EngineFacts:
    """A TensorRT engine that was built of one graph: it runs nowhere but where it fits (`sinkrt.engines`)."""

    _LABEL: ClassVar[str] = "engine {}"

    file: str = field(metadata=about("path inside the bundle", is_path=True))
    bytes: int = field(metadata=about("size", least=0, label="file size", unit=" bytes"))
    sha256: str = field(metadata=about("of the engine", is_digest=True, label="file sha256"))
    graph_sha256: str = field(metadata=about("of the ONNX file", is_digest=True, label="file sha256"))
    flavour: str = field(metadata=about("which TensorRT", one_of=FLAVOURS))
    version: str = field(metadata=about("of TensorRT, in full"))
    plugin_abi: str | None = field(metadata=about("of the plugin library; None: no plugin"))
    gpu: str | None = field(metadata=about("that it was built on; None: it suits all that the flavour supports"))
    compute_capability: str | None = field(metadata=about("as 9.0; None: it suits all that the flavour supports"))
    precision: str = field(metadata=about("of the matmuls that are not quantised", one_of=FLOAT_DTYPES))

    def __post_init__(self) -> None:
        check_rules(self)
