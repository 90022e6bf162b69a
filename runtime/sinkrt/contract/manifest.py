"""The manifest as a whole: its dataclass, the checks across its parts, its fingerprint and its text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sinkrt.contract.constants import ATTENTION_SCHEMA, CPU, FLOAT_DTYPES, RECURRENT_KINDS, SCHEMA_VERSION, TARGETS
from sinkrt.contract.drafts import check_verify, num_drafts
from sinkrt.contract.layout import attention_entries, check_layout, uniform_caches
from sinkrt.contract.reader import build_from_json, parse_json
from sinkrt.contract.rules import about, check_rules, is_inside, require
from sinkrt.contract.schema import (
    AffineAttention,
    AttentionCache,
    EngineFacts,
    FileFacts,
    GraphSpec,
    HeadWindow,
    ModelFacts,
    Quantization,
    SinkTuning,
    StateSpec,
    StreamFacts,
    TokenizerFacts,
)
from sinkrt.errors import BundleError, problem


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime knows about a bundle.

    With plugins `position` is int32 [B, 2], t >> 16 and t & 0xffff, and `ids` and `num_valid` are int32.
    `head_windows` has each key head of each layer with a window once, in the order of the states. States of group g of
    a layer with several groups are named ``<kind>.<layer>.<g>`` and hold its heads alone.

    `attention` has the sizes of each cache in the order of the states, if one cache has others than `model` says or
    belongs to a layer's second call. Such models have no `sink_tuning`, `head_windows` or `affine_attention`. Their
    graphs have these sizes in their metadata as well, under ``sinkexport.layout``: runtimes compare the two.
    """

    schema_version: int = field(metadata=about("version of this schema"))
    target: str = field(metadata=about("what runs the graphs", one_of=TARGETS))
    weights_dtype: str = field(metadata=about("of arithmetic, and of weights not quantised", one_of=FLOAT_DTYPES))
    model: ModelFacts = field(metadata=about("what the bundle was made from"))
    stream: StreamFacts = field(metadata=about("geometry of the cache"))
    graphs: Mapping[str, GraphSpec] = field(
        metadata=about("by role: decode always, prefill if T > 1, verify if drafts can be verified")
    )
    states: tuple[StateSpec, ...] = field(metadata=about("states of all layers"))
    tokenizer: TokenizerFacts | None = field(metadata=about("None: the bundle has none"))
    files: Mapping[str, FileFacts] = field(metadata=about("every file but this and the engines, by path (with '/')"))
    producer: Mapping[str, str] = field(metadata=about("versions of what made it, for bug reports"))
    quantization: Quantization | None = field(default=None, metadata=about("None: floating point"))
    plugin_abi: str | None = field(
        default=None,
        metadata=about("of the plugins or the CPU library that the graphs have nodes of; None: standard operators"),
    )
    engines: Mapping[str, EngineFacts] | None = field(
        default=None, metadata=about("by the role of their graph; None: none were built")
    )
    sink_tuning: SinkTuning | None = field(default=None, metadata=about("None: attention is the model's own"))
    head_windows: tuple[HeadWindow, ...] | None = field(
        default=None, metadata=about("None: all heads keep stream.window_size tokens")
    )
    affine_attention: AffineAttention | None = field(
        default=None, metadata=about("None: attention weights are those of the softmax")
    )
    attention: tuple[AttentionCache, ...] | None = field(
        default=None, metadata=about("None: each cache has the model's heads and head_dim; empty: no attention")
    )

    def __post_init__(self) -> None:
        check_rules(self)

    def _check(self) -> None:
        self._check_attention()
        if self.sink_tuning is not None:
            self._check_sink_tuning(self.sink_tuning)
        if self.head_windows is not None:
            self._check_head_windows(self.head_windows)
        if self.affine_attention is not None:
            self._check_affine_attention(self.affine_attention)
        for role in self.engines or ():
            require(role in self.graphs, "engines", role, "the role of a graph")
        require("decode" in self.graphs, "graphs", sorted(self.graphs), "a graph named 'decode'")
        for graph in self.graphs.values():
            require(graph.file in self.files, "graph file", graph.file, "a file that 'files' lists")
        for path in self.files:
            require(is_inside(path), "file path", path, "a relative path inside the bundle")
        if self.tokenizer is not None:
            for path in filter(None, (self.tokenizer.file, self.tokenizer.chat_template)):
                require(path in self.files, "tokenizer file", path, "a file that 'files' lists")
        check_layout(self)
        check_verify(self)

    def _check_attention(self) -> None:
        heads, entries = self.model.num_q_heads, self.attention
        expected = "null or a cache, as 'model' has heads" if heads else "an empty list, as 'model' has no heads"
        require((heads == 0) == (entries == ()), "attention", _count(entries), expected)
        if entries is None:
            return
        expected = f"null, or schema_version {ATTENTION_SCHEMA} and newer"
        require(self.schema_version >= ATTENTION_SCHEMA, "attention", f"it in schema {self.schema_version}", expected)
        is_uniform = attention_entries(self.model, entries) is None
        require(not is_uniform, "attention", "the sizes that 'model' has", "null for these")
        for name in ("sink_tuning", "head_windows", "affine_attention"):
            require(getattr(self, name) is None, name, "it beside 'attention'", "null where caches differ in size")

    def _check_sink_tuning(self, tuning: SinkTuning) -> None:
        wanted = (self.model.num_layers, self.model.num_q_heads)
        tables: dict[str, tuple[tuple[Any, ...], ...]] = {"first_token_scale": tuning.first_token_scale}
        if tuning.act is not None:
            tables["act.heads"] = tuning.act.heads
        for name, rows in tables.items():
            found = (len(rows), *{len(row) for row in rows})
            require(found == wanted, f"sink_tuning.{name}", found, f"{wanted}: layers, query heads")

    def _check_head_windows(self, groups: tuple[HeadWindow, ...]) -> None:
        found = sorted((group.layer, head) for group in groups for head in group.kv_heads)
        layers = sorted({state.layer for state in self.states if state.kind == "window_k"})
        wanted = [(layer, head) for layer in layers for head in range(self.model.num_kv_heads)]
        require(found == wanted, "head_windows", f"{len(found)} key heads", f"each of the {len(wanted)} key heads once")
        longest = max((group.window_size for group in groups), default=0)
        limit = self.stream.window_size
        require(longest <= limit, "head_windows", longest, f"<= window_size={limit}")

    def _check_affine_attention(self, facts: AffineAttention) -> None:
        require(facts.file in self.files, "affine_attention.file", facts.file, "a file that 'files' lists")
        layers, heads = self.model.num_layers, {head for layer in facts.heads for head in layer}
        found = f"{len(facts.heads)} layers, heads up to {max(heads, default=0)}"
        ok = len(facts.heads) == layers and all(0 <= head < self.model.num_q_heads for head in heads)
        require(ok, "affine_attention.heads", found, f"{layers} layers, heads below {self.model.num_q_heads}")

    @property
    def caches(self) -> tuple[AttentionCache, ...]:
        """Sizes of every cache in the order of the states, as `attention` or else `model` says; the groups of a layer
        (`head_windows`) are one cache."""
        return uniform_caches(self) if self.attention is None else self.attention

    @property
    def has_tensorrt_plugin(self) -> bool:
        """Whether the graphs have nodes of the TensorRT plugin: `plugin_abi` is the CPU library's otherwise."""
        return self.plugin_abi is not None and self.target != CPU

    @property
    def is_recurrent(self) -> bool:
        """Whether there are recurrent states: these know no positions, so an idle stream takes `NO_TOKEN`."""
        return any(state.kind in RECURRENT_KINDS for state in self.states)

    @property
    def num_drafts(self) -> int:
        """K, drafted tokens that one run of the verify graph takes; 0: the bundle has no such graph."""
        return num_drafts(self.graphs)

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
        if self.attention is not None:
            facts.append({"attention": [dataclasses.asdict(cache) for cache in self.attention]})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Stable text: the same bundle gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and validate.

        Raises: BundleError for malformed text, an unknown or missing key, or a newer schema.
        """
        raw = parse_json(text)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        is_integer = isinstance(version, int) and not isinstance(version, bool)
        require(is_integer, "schema_version", version, "an integer")
        assert isinstance(version, int)
        require(version >= 1, "schema_version", version, "at least 1")
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


def _count(entries: Sequence[AttentionCache] | None) -> str:
    return "null" if entries is None else f"{len(entries)} caches"
