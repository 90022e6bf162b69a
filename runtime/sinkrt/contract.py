"""The bundle's manifest: the only thing that the exporter and the runtimes share.

``manifest.json`` names every file of a bundle with its size and SHA-256, every graph with its tensors,
and every state tensor with the input and the output that must be bound to one buffer.
Standard library only, so that any tool can read a bundle.

The schema version is one integer. A runtime reads its own version and older ones it knows;
a newer one is refused, because guessing at an unknown field could silently change results.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sinkrt.errors import BundleError, problem
from sinkrt.files import is_special
from sinkrt.layout import (
    ALL_KINDS,
    DTYPE_BYTES,
    MASS_KIND,
    MAX_RANK,
    MAX_TENSOR_BYTES,
    RECURRENT_KINDS,
    SCALE_KINDS,
    STATE_KINDS,
    check_layout,
)
from sinkrt.ring import POSITION_LIMIT

__all__ = [
    "DTYPE_BYTES",
    "MANIFEST_NAME",
    "MASS_KIND",
    "NO_TOKEN",
    "PLUGIN_ABI",
    "RECURRENT_KINDS",
    "SCALE_KINDS",
    "SCHEMA_VERSION",
    "STATE_KINDS",
    "TARGETS",
    "ActTuning",
    "AffineAttention",
    "EngineFacts",
    "FileFacts",
    "GraphSpec",
    "HeadWindow",
    "Manifest",
    "ModelFacts",
    "Quantization",
    "SinkTuning",
    "StateSpec",
    "StreamFacts",
    "TensorSpec",
    "TokenizerFacts",
    "build_from_json",
    "check_files",
    "hash_file",
    "load_manifest",
]

SCHEMA_VERSION = 5
"""2: `quantization` and the scales of an INT8 window. 3: `plugin_abi` and `engines`. 4: `sink_tuning` and
`head_windows`. 5: `affine_attention`, and `act` in `sink_tuning`, with a state of its own. Older ones are read as
well."""

MANIFEST_NAME = "manifest.json"
NO_TOKEN = -1
"""Id of a stream that stands still while others step, in models with such layers: their states know no positions."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

TARGETS = ("onnx", "tensorrt")
PLUGIN_ABI = "3"
"""Of the TensorRT plugins whose nodes this version writes: their names, inputs, outputs and fields."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A graph input or output.

    name: its name in the graph. shape: static, every axis >= 1. dtype: a key of ``DTYPE_BYTES``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        _check(bool(self.name), "tensor name", "''", "a name")
        _check(_is_plain(self.name), "tensor name", repr(self.name), "text without control characters")
        rank = len(self.shape)
        _check(rank <= MAX_RANK, f"shape of '{self.name}'", f"{rank} axes", f"at most {MAX_RANK}")
        _check(all(n >= 1 for n in self.shape), f"shape of '{self.name}'", self.shape, "every axis >= 1")
        _check(self.dtype in DTYPE_BYTES, f"dtype of '{self.name}'", self.dtype, " | ".join(DTYPE_BYTES))
        _check(self.nbytes <= MAX_TENSOR_BYTES, f"shape of '{self.name}'", self.shape, "at most 2^46 bytes")

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = DTYPE_BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """One state tensor of one layer: `input` and `output` must be bound to the same buffer.

    kind: ``sink_k | sink_v`` of shape [B, Hkv, S, D], ``window_k | window_v`` of shape [B, Hkv, W, D], or, where the
    window is int8, ``window_k_scale | window_v_scale`` of shape [B, Hkv, W]: one for each head and token. A layer whose
    own sliding window is smaller than S + W has that window for W, and no sinks. ``attention_mass`` of shape
    [B, Hq, 2, W]: sums for `ActTuning`, after the last token at an even and at an odd position. So a step reads what
    the token before it left, and can be repeated. ``conv | recurrent``, of any shape [B, ..]: of linear attention. All
    states are zero where a stream begins.
    """

    layer: int
    kind: str
    input: str
    output: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        _check(self.layer >= 0, "state layer", self.layer, ">= 0")
        _check(self.kind in ALL_KINDS, "state kind", self.kind, " | ".join(ALL_KINDS))
        _check(self.input != self.output, "state output name", self.output, "a name other than the input's")
        TensorSpec(self.input, self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return TensorSpec(self.input, self.shape, self.dtype).nbytes


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph. `inputs` and `outputs` leave the states out: `Manifest.states` lists those.

    file: path inside the bundle. num_tokens: T, tokens of each stream in one run.
    """

    file: str
    num_tokens: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        _check(self.num_tokens >= 1, "graph num_tokens", self.num_tokens, ">= 1")


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the bundle was made from. Counts, not units; `family` is transformers' model_type."""

    name: str
    architecture: str
    family: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    num_parameters: int
    position_scheme: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim", "hidden_size", "vocab_size"):
            _check(getattr(self, field) >= 1, f"model.{field}", getattr(self, field), ">= 1")
        _check(
            self.num_q_heads % self.num_kv_heads == 0,
            "model.num_q_heads",
            self.num_q_heads,
            f"a multiple of num_kv_heads={self.num_kv_heads}",
        )


@dataclasses.dataclass(frozen=True)
class StreamFacts:
    """The cache's geometry, in tokens: S, W, B and the chunk size T of the prefill graph.

    position_limit: the first stream position that the graph's integer phase cannot take.
    """

    num_sink_tokens: int
    window_size: int
    batch: int
    chunk_size: int
    position_limit: int

    def __post_init__(self) -> None:
        _check(self.num_sink_tokens >= 0, "stream.num_sink_tokens", self.num_sink_tokens, ">= 0")
        _check(self.window_size >= 1, "stream.window_size", self.window_size, ">= 1")
        _check(self.batch >= 1, "stream.batch", self.batch, ">= 1")
        _check(self.batch * self.capacity <= POSITION_LIMIT, "stream.batch", self.batch, "2^47 tokens in all caches")
        _check(1 <= self.position_limit <= POSITION_LIMIT, "stream.position_limit", self.position_limit, "1 .. 2^47")
        _check(
            1 <= self.chunk_size <= self.window_size,
            "stream.chunk_size",
            self.chunk_size,
            f"1 .. window_size={self.window_size}",
        )

    @property
    def capacity(self) -> int:
        """C = S + W, tokens."""
        return self.num_sink_tokens + self.window_size


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    """Tokenizer files inside the bundle. `chat_template` is a Jinja file or None."""

    file: str
    chat_template: str | None

    def __post_init__(self) -> None:
        for path in (self.file, self.chat_template):
            _check(path is None or _is_inside(path), "tokenizer file", path, "a relative path inside the bundle")


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 (hex) of one file of the bundle."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check(self.bytes >= 0, "file size", self.bytes, ">= 0 bytes")
        _check(re.fullmatch("[0-9a-f]{64}", self.sha256) is not None, "file sha256", self.sha256, "64 hex digits")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a bundle was made small. The recipe's file says all; this is what tools ask for.

    recipe: its name. weights: ``float | int8 | int4``. activations: ``float | dynamic | static``, what products take.
    kv: ``fp | int8``, the window's entries (sinks are never quantised).
    calibration_sha256: of the calibration file that was used, if one was (hex).
    thresholds: what the recipe promises, for `sinkexport verify`: ``perplexity_increase`` (0.01: 1%),
    ``kl_divergence`` (mean, nats) and ``top1_agreement`` (share), all against floating point.
    """

    recipe: str
    weights: str
    activations: str
    kv: str
    calibration_sha256: str | None
    thresholds: Mapping[str, float]

    def __post_init__(self) -> None:
        for field, values in (
            ("weights", ("float", "int8", "int4")),
            ("activations", ("float", "dynamic", "static")),
            ("kv", ("fp", "int8")),
        ):
            _check(getattr(self, field) in values, f"quantization.{field}", getattr(self, field), " | ".join(values))


@dataclasses.dataclass(frozen=True)
class ActTuning:
    """Later sinks are scaled down and what they lose goes to the other tokens (ACT, arXiv:2406.15765).

    How much of a sink a token in the window is: its mean attention from the queries since it came, over the same share
    for all cached tokens, is `alpha` >= 1 (none) to 2 * alpha (all), once it has had `min_queries` >= 1 queries.
    beta: 0 .. 1 excluded, what a sink's attention is multiplied by. heads: [L][Hq], where it is done.
    """

    alpha: float
    beta: float
    min_queries: int
    heads: tuple[tuple[bool, ...], ...]

    def __post_init__(self) -> None:
        _check(1 <= self.alpha < math.inf, "sink_tuning.act.alpha", self.alpha, ">= 1")
        _check(0 <= self.beta < 1, "sink_tuning.act.beta", self.beta, ">= 0 and < 1")
        _check(self.min_queries >= 1, "sink_tuning.act.min_queries", self.min_queries, ">= 1")


@dataclasses.dataclass(frozen=True)
class SinkTuning:
    """How attention to sinks was changed, without training. It is in the graphs: a runtime does nothing about it.

    sha256: of the file that was given to the export (hex).
    first_token_scale: [L][Hq] > 0, factors on the attention weight of token 0 before it is normalised again
    (ZeroTuning, arXiv:2505.11739).
    act: calibration of later sinks; None: none.
    """

    sha256: str
    first_token_scale: tuple[tuple[float, ...], ...]
    act: ActTuning | None = None

    def __post_init__(self) -> None:
        FileFacts(0, self.sha256)
        smallest = min((factor for layer in self.first_token_scale for factor in layer), default=0.0)
        _check(smallest > 0, "sink_tuning.first_token_scale", smallest, "> 0")


@dataclasses.dataclass(frozen=True)
class AffineAttention:
    """How attention weights are scaled and shifted (arXiv:2602.23057). It is in the graphs: a runtime does nothing.

    sha256: of the file that was given to the export (hex). file: path of its copy inside the bundle.
    has_inputs: whether a scale or a bias depends on the hidden state. heads: [L], the query heads that are changed.
    """

    sha256: str
    file: str
    has_inputs: bool
    heads: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        FileFacts(0, self.sha256)


@dataclasses.dataclass(frozen=True)
class HeadWindow:
    """Key heads of a layer that keep the last window_size tokens beside the sinks, with the query heads they serve."""

    layer: int
    kv_heads: tuple[int, ...]
    window_size: int

    def __post_init__(self) -> None:
        _check(self.layer >= 0, "head_windows layer", self.layer, ">= 0")
        _check(self.window_size >= 1, "head_windows window_size", self.window_size, ">= 1")
        _check(len(self.kv_heads) > 0, "head_windows kv_heads", "none", "at least one")


@dataclasses.dataclass(frozen=True)
class EngineFacts:
    """An engine that 'sinkexport build' made of one graph: what runs nowhere but where it fits (`sinkrt.engines`).

    file: path inside the bundle. bytes, sha256: of it. graph_sha256: of the ONNX file that it was made of.
    flavour: ``TensorRT | TensorRT-RTX``. version: of that, in full. plugin_abi: of the plugin library; None: no plugin.
    gpu, compute_capability: of the machine that built it, as ``9.0``; None: it suits all that the flavour supports.
    precision: ``float32 | float16``, of the products that are not quantised.
    """

    file: str
    bytes: int
    sha256: str
    graph_sha256: str
    flavour: str
    version: str
    plugin_abi: str | None
    gpu: str | None
    compute_capability: str | None
    precision: str

    def __post_init__(self) -> None:
        _check(_is_inside(self.file), "engine file", self.file, "a relative path inside the bundle")
        FileFacts(self.bytes, self.sha256)
        FileFacts(0, self.graph_sha256)
        _check(self.flavour in ("TensorRT", "TensorRT-RTX"), "engine flavour", self.flavour, "TensorRT | TensorRT-RTX")
        _check(self.precision in ("float32", "float16"), "engine precision", self.precision, "float32 | float16")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that a runtime knows about a bundle.

    weights_dtype: ``float32 | float16``, the dtype of arithmetic, and of weights that are not quantised.
    graphs: by role; ``decode`` is always there, ``prefill`` may be.
    files: every other file of the bundle by path (with '/'), manifest.json excepted.
    producer: versions of what made it, for bug reports.
    quantization: None for a floating-point bundle.
    plugin_abi: of the TensorRT plugins that the graphs have nodes of; None: standard operators only. With plugins
    `position` is int32 [B, 2], t >> 16 and t & 0xffff, and `ids` and `num_valid` are int32.
    engines: by the role of their graph; None: none were built. They are not in `files`.
    sink_tuning: None: attention is the model's own.
    head_windows: each key head of each layer that has a window once, in the order of the states: those of group g of a
    layer with several are named ``<kind>.<layer>.<g>`` and hold its heads alone. None: all heads keep
    `stream.window_size` tokens.
    affine_attention: None: attention weights are those of the softmax.
    """

    schema_version: int
    target: str
    weights_dtype: str
    model: ModelFacts
    stream: StreamFacts
    graphs: Mapping[str, GraphSpec]
    states: tuple[StateSpec, ...]
    tokenizer: TokenizerFacts | None
    files: Mapping[str, FileFacts]
    producer: Mapping[str, str]
    quantization: Quantization | None = None
    plugin_abi: str | None = None
    engines: Mapping[str, EngineFacts] | None = None
    sink_tuning: SinkTuning | None = None
    head_windows: tuple[HeadWindow, ...] | None = None
    affine_attention: AffineAttention | None = None

    def __post_init__(self) -> None:
        if self.sink_tuning is not None:
            self._check_sink_tuning(self.sink_tuning)
        if self.head_windows is not None:
            self._check_head_windows(self.head_windows)
        if self.affine_attention is not None:
            self._check_affine_attention(self.affine_attention)
        for role in self.engines or ():
            _check(role in self.graphs, "engines", role, "the role of a graph")
        _check(self.target in TARGETS, "target", self.target, " | ".join(TARGETS))
        _check(self.weights_dtype in ("float32", "float16"), "weights_dtype", self.weights_dtype, "float32 | float16")
        _check("decode" in self.graphs, "graphs", sorted(self.graphs), "a graph named 'decode'")
        for graph in self.graphs.values():
            _check(graph.file in self.files, "graph file", graph.file, "a file that 'files' lists")
        for path in self.files:
            _check(_is_inside(path), "file path", path, "a relative path inside the bundle")
        if self.tokenizer is not None:
            for path in filter(None, (self.tokenizer.file, self.tokenizer.chat_template)):
                _check(path in self.files, "tokenizer file", path, "a file that 'files' lists")
        check_layout(self)

    def _check_sink_tuning(self, tuning: SinkTuning) -> None:
        wanted = (self.model.num_layers, self.model.num_q_heads)
        tables: dict[str, tuple[tuple[Any, ...], ...]] = {"first_token_scale": tuning.first_token_scale}
        if tuning.act is not None:
            tables["act.heads"] = tuning.act.heads
        for name, rows in tables.items():
            found = (len(rows), *{len(row) for row in rows})
            _check(found == wanted, f"sink_tuning.{name}", found, f"{wanted}: layers, query heads")

    def _check_head_windows(self, groups: tuple[HeadWindow, ...]) -> None:
        found = sorted((group.layer, head) for group in groups for head in group.kv_heads)
        layers = sorted({state.layer for state in self.states if state.kind == "window_k"})
        wanted = [(layer, head) for layer in layers for head in range(self.model.num_kv_heads)]
        _check(found == wanted, "head_windows", f"{len(found)} key heads", f"each of the {len(wanted)} key heads once")
        longest = max((group.window_size for group in groups), default=0)
        _check(longest <= self.stream.window_size, "head_windows", longest, f"<= window_size={self.stream.window_size}")

    def _check_affine_attention(self, facts: AffineAttention) -> None:
        _check(facts.file in self.files, "affine_attention.file", facts.file, "a file that 'files' lists")
        layers, heads = self.model.num_layers, {head for layer in facts.heads for head in layer}
        found = f"{len(facts.heads)} layers, heads up to {max(heads, default=0)}"
        ok = len(facts.heads) == layers and all(0 <= head < self.model.num_q_heads for head in heads)
        _check(ok, "affine_attention.heads", found, f"{layers} layers, heads below {self.model.num_q_heads}")

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights files."""
        return sum(facts.bytes for path, facts in self.files.items() if path.startswith("weights"))

    @property
    def state_bytes(self) -> int:
        """Bytes of all state tensors together, constant for the life of a session."""
        return sum(state.nbytes for state in self.states)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model's weights, the cache's geometry and its tuning: what a saved state depends on.

        What does not change the meaning of a state (tokenizer, graphs, engines, the size of a chunk) is left out,
        so that a state survives a rebuilt engine.
        """
        geometry = {name: value for name, value in dataclasses.asdict(self.stream).items() if name != "chunk_size"}
        weights = {path: f.sha256 for path, f in self.files.items() if path.startswith("weights")}
        facts: list[Any] = [dataclasses.asdict(self.model), geometry, self.weights_dtype, weights]
        if self.sink_tuning is not None:  # later tokens were computed under it
            facts.append(self.sink_tuning.sha256)
        if self.head_windows is not None:
            facts.append([dataclasses.asdict(group) for group in self.head_windows])
        if self.affine_attention is not None:
            facts.append(self.affine_attention.sha256)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Stable text: the same bundle gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and validate.

        Raises: BundleError for malformed text, an unknown or missing key, or a newer schema.
        """
        try:
            raw = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
            if _SURROGATE.search(text):  # a pair of them is one character; a lone one is none
                json.dumps(raw, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # the latter of brackets without end
            raise BundleError(
                problem(MANIFEST_NAME, received=f"invalid JSON ({error})", expected="a manifest", fix="export again")
            ) from None
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if not isinstance(version, int) or isinstance(version, bool):
            raise BundleError(
                problem("schema_version", received=version, expected="an integer", fix="export the model again")
            )
        if version < 1:
            raise BundleError(
                problem("schema_version", received=version, expected="at least 1", fix="export the model again")
            )
        if version > SCHEMA_VERSION:
            raise BundleError(
                problem(
                    "schema_version",
                    received=version,
                    expected=f"at most {SCHEMA_VERSION}",
                    fix="this bundle was made by a newer sinkexport: upgrade this runtime",
                )
            )
        return build_from_json(cls, raw, "manifest")


def load_manifest(bundle: Path) -> Manifest:
    """Read ``bundle/manifest.json``.

    Raises: BundleError if it is missing or invalid.
    """
    path = bundle / MANIFEST_NAME
    try:
        if is_special(path):
            raise OSError("a device, pipe or socket, no file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "a bundle needs one" if isinstance(error, FileNotFoundError) else str(error)
        raise BundleError(
            problem(
                MANIFEST_NAME,
                received=f"no readable file at '{path}' ({reason})",
                expected="a folder that 'sinkexport export' wrote",
                fix="check the path or export the model",
            )
        ) from None
    return Manifest.from_json(text)


def hash_file(path: Path) -> FileFacts:
    """Size and SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return FileFacts(os.path.getsize(path), digest.hexdigest())


def check_files(bundle: Path, manifest: Manifest, *, hashes: bool = True) -> None:
    """Compare every file of the bundle with the manifest: size always, SHA-256 if `hashes`.

    Raises: BundleError naming the first file that is missing or differs.
    """
    for name, facts in sorted(manifest.files.items()):
        path = bundle / name
        if not path.is_file():
            raise BundleError(
                problem(name, received="no such file", expected="every file of the bundle", fix="copy the whole folder")
            )
        size = path.stat().st_size
        if size != facts.bytes:
            raise BundleError(
                problem(name, received=f"{size} bytes", expected=f"{facts.bytes} bytes", fix="copy or export it again")
            )
        if hashes and (found := hash_file(path).sha256) != facts.sha256:
            raise BundleError(
                problem(
                    name,
                    received=f"sha256 {found[:12]}..",
                    expected=f"{facts.sha256[:12]}..",
                    fix="the file is corrupt: copy or export it again",
                )
            )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of two alike, readers keep the first or the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} twice in an object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _is_plain(text: str) -> bool:
    """Whether a text is UTF-8 (no lone surrogates) and has no control characters."""
    return all(c >= " " and c != "\x7f" and not "\ud800" <= c <= "\udfff" for c in text)


def _is_inside(path: str) -> bool:
    parts = path.split("/")
    return _is_plain(path) and "\\" not in path and not {"", ".."} & set(parts)


def _check(ok: bool, what: str, received: object, expected: str) -> None:
    if not ok:
        raise BundleError(problem(what, received=received, expected=expected, fix="export the model again"))


T = TypeVar("T")


def build_from_json(cls: type[T], raw: Any, where: str) -> T:
    """Make a dataclass of parsed JSON, strictly: no unknown key, no missing one, no wrong type."""
    if not isinstance(raw, dict):
        raise BundleError(problem(where, received=type(raw).__name__, expected="an object", fix="export again"))
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = {field.name for field in fields}
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    if unknown := sorted(set(raw) - names):
        raise BundleError(
            problem(
                where,
                received=f"unknown key '{unknown[0]}'",
                expected=", ".join(sorted(names)),
                fix="remove it or export again",
            )
        )
    if missing := sorted(required - set(raw)):
        raise BundleError(problem(where, received=f"no key '{missing[0]}'", expected="every key", fix="export again"))
    return cls(**{name: _value(hints[name], raw[name], f"{where}.{name}") for name in names & set(raw)})


def _value(hint: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # the schema's only unions are "X | None"
        if raw is None:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), raw, where)
    if origin is tuple:
        _check(isinstance(raw, list), where, type(raw).__name__, "a list")
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if origin is not None and issubclass(origin, Mapping):
        _check(isinstance(raw, dict), where, type(raw).__name__, "an object")
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in raw.items()}
    if dataclasses.is_dataclass(hint):
        return build_from_json(typing.cast(type, hint), raw, where)
    if type(raw) is int:
        limit = 2**1023 if hint is float else 2**63 - 1
        _check(-limit - 1 <= raw <= limit, where, "a huge integer", "one of 64 bits")
        if hint is float:  # JSON writes 1.0 as 1 in some tools
            return float(raw)
    ok = isinstance(raw, hint) and not (hint is int and isinstance(raw, bool))
    ok = ok and not (hint is float and not math.isfinite(raw))
    _check(ok, where, f"{type(raw).__name__} {raw!r}"[:60], hint.__name__)
    return raw
