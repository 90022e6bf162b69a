"""Plans that map a GGUF architecture to transformers: a configuration, and the tensors of each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sinkexport.loading.gguf_models.facts import Facts, refused
from sinkexport.loading.gguf_models.file import END_NAMES
from sinkexport.loading.gguf_models.rope import FREQS, LONG, SHORT, rope_parameters
from sinkexport.loading.gguf_models.tensors import Module, Rule

BLOCK, LAYER = "blk.{i}.", "model.layers.{i}."


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan to turn a file into a model.

    config_class: of transformers. arguments: of the configuration. modules: where weights and biases are.
    rules: parameters that are made otherwise. used: tensors that the arguments were made of.
    """

    config_class: str
    arguments: Mapping[str, Any]
    modules: tuple[Module, ...]
    rules: tuple[Rule, ...] = ()
    used: frozenset[str] = frozenset()

    @property
    def head_dim(self) -> int:
        """Columns of a head."""
        arguments = self.arguments
        return int(arguments.get("head_dim") or arguments["hidden_size"] // arguments["num_attention_heads"])


def sizes(facts: Facts, *, feed_forward: bool = True) -> dict[str, Any]:
    """Arguments that all configurations share: sizes, ids of special tokens, whether the head is the embedding."""
    hidden = facts.count("embedding_length")
    rows, columns = facts.shape("token_embd.weight") if facts.has("token_embd.weight") else (0, 0)
    if columns != hidden:
        raise refused(
            f"'{facts.architecture}.embedding_length' = {hidden} and 'token_embd.weight' of {(rows, columns)}",
            "the same",
            "download the file again",
        )
    heads = facts.count("attention.head_count")
    kv_heads = facts.count("attention.head_count_kv", heads)
    if heads > hidden * 16 or heads % kv_heads:
        raise refused(f"{heads} heads of queries and {kv_heads} of keys for {hidden} columns", "a whole ratio")
    vocab_size = facts.vocab_size()
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **({"intermediate_size": facts.count("feed_forward_length")} if feed_forward else {}),
        "max_position_embeddings": facts.context_length,
        "tie_word_embeddings": not facts.has("output.weight"),
        **special_ids(facts, vocab_size),
    }


def special_ids(facts: Facts, vocab_size: int) -> dict[str, int | None]:
    """Ids of special tokens, None for those that the file does not name: none is made up.

    Raises: UsageError for an id outside the vocabulary, those of further ends of a text included.
    """
    found: dict[str, int | None] = {}
    for name in ("bos", "padding", *END_NAMES):
        value = facts.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value in (None, -1, 0xFFFFFFFF):  # how old converters wrote "none"
            found[name] = None
        elif type(value) is int and 0 <= value < vocab_size:
            found[name] = value
        else:
            raise refused(f"'tokenizer.ggml.{name}_token_id' = {value!r:.40}", f"an id below {vocab_size}")
    return {"bos_token_id": found["bos"], "eos_token_id": found["eos"], "pad_token_id": found["padding"]}


def head_dim(facts: Facts, arguments: Mapping[str, Any]) -> int:
    """Columns of a head of queries, keys and values, which must be as many."""
    hidden, heads = arguments["hidden_size"], arguments["num_attention_heads"]
    length = facts.count("attention.key_length", hidden // heads if hidden % heads == 0 else None)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        facts.expect(key, length, "heads of values and of keys are as long here")
    return length


def packed_heads(facts: Facts, arguments: Mapping[str, Any]) -> int:
    """The head's columns in a family whose heads share the hidden columns out."""
    length = head_dim(facts, arguments)
    if length * arguments["num_attention_heads"] != arguments["hidden_size"]:
        raise refused(
            f"heads of {length} columns in '{facts.architecture}'",
            f"{arguments['num_attention_heads']} heads of {arguments['hidden_size']} columns together",
        )
    return length


def shared_arguments(
    facts: Facts,
    *,
    packed: bool = False,
    whole: bool = False,
    partial: bool = False,
    tensors: bool = False,
    truncate: bool = True,
    feed_forward: bool = True,
) -> dict[str, Any]:
    """Arguments that families with rotary positions share: sizes, heads and rotation.

    packed: heads share the hidden columns out, so that the configuration has no ``head_dim``. whole: no file of the
    family rotates parts of heads. partial: the configuration's own default is less than whole heads. tensors,
    truncate: see `rope_parameters`. feed_forward: whether layers have an MLP beside experts.
    """
    arguments = sizes(facts, feed_forward=feed_forward)
    length = (packed_heads if packed else head_dim)(facts, arguments)
    if whole:
        facts.expect("rope.dimension_count", length, "whole heads are rotated")
    parameters = rope_parameters(facts, length, tensors=tensors, truncate=truncate)
    if partial:
        parameters.setdefault("partial_rotary_factor", 1.0)
    return arguments | ({} if packed else {"head_dim": length}) | {"rope_parameters": parameters}


def rope_tensors(facts: Facts) -> frozenset[str]:
    """Tensors of rotary factors that the file has."""
    return frozenset(name for name in (FREQS, LONG, SHORT) if name in facts.tensors)


def layer_types(facts: Facts, pattern: int) -> list[str]:
    """Layers that see a window: all but the last of every `pattern`, unless the file says otherwise."""
    value = facts.value("attention.sliding_window_pattern")
    if isinstance(value, list):
        if len(value) != facts.num_layers or any(type(one) not in (bool, int) for one in value):
            raise refused(
                f"'{facts.architecture}.attention.sliding_window_pattern' of {len(value)} values",
                f"one truth value for each of {facts.num_layers} layers",
            )
        sliding = [bool(one) for one in value]
    else:
        pattern = facts.count("attention.sliding_window_pattern", pattern, least=0)
        sliding = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(facts.num_layers)]
    return ["sliding_attention" if one else "full_attention" for one in sliding]


def biased(facts: Facts, *modules: str) -> bool:
    """Whether any layer has a bias in any of the modules, named without ``blk.{i}.``."""
    return any(facts.has(f"{BLOCK}{module}.bias") for module in modules)


def attention_biased(facts: Facts) -> bool:
    """Whether any layer has a bias in any projection of attention."""
    return biased(facts, "attn_q", "attn_k", "attn_v", "attn_output")


def outer(norm: str = "model.norm", embedding: str = "model.embed_tokens", head: str = "lm_head") -> tuple[Module, ...]:
    """Embedding, last norm and head."""
    return (Module("token_embd", embedding), Module("output_norm", norm), Module("output", head))


def layer(gguf: str, hf: str, build: Any = None, *, optional_bias: bool = False, root: str = LAYER) -> Module:
    """A module of each layer."""
    return Module(f"{BLOCK}{gguf}", f"{root}{hf}", build, optional_bias)


def attention(
    query: Any = None, key: Any = None, *, output: str = "o_proj", output_bias: bool = False
) -> tuple[Module, ...]:
    """Projections of attention. query, key: how their rows are put in transformers' order.

    output_bias: whether the family always has a bias behind attention.
    """
    three = tuple(f"{BLOCK}attn_{letter}" for letter in "qkv")
    builds = (query, key, None)
    return (
        *(
            Module(gguf, f"{LAYER}self_attn.{gguf[-1]}_proj", build, optional_bias=True, together=three)
            for gguf, build in zip(three, builds, strict=True)
        ),
        layer("attn_output", f"self_attn.{output}", optional_bias=not output_bias),
    )


def gated_mlp() -> tuple[Module, ...]:
    """Gate, up and down."""
    return tuple(layer(f"ffn_{name}", f"mlp.{name}_proj", optional_bias=True) for name in ("gate", "up", "down"))


def pre_norms() -> tuple[Module, ...]:
    """Norms before attention and before the MLP."""
    return (layer("attn_norm", "input_layernorm"), layer("ffn_norm", "post_attention_layernorm"))


def head_norms(build: Any = None) -> tuple[Module, ...]:
    """Norms of queries and keys."""
    return (
        layer("attn_q_norm", "self_attn.q_norm", build),
        layer("attn_k_norm", "self_attn.k_norm", build),
    )
