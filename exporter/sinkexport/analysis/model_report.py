"""What an export of a model would read and refuse: from headers and metadata, without the weights."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sinkrt.errors import SinkError, UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer, one_line
from sinkexport.sources import (
    Origin,
    load_config,
    load_generation_config,
    load_tokenizer,
    locate,
    quiet_transformers,
    refuse_architecture,
)

RECURRENT = "recurrent"
"""Kind of layers that have states of fixed size instead of attention."""

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "token_embd.weight")
"""Endings of names of embedding tables."""
Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file. dtype: safetensors' or GGUF's name of it. shape: as in PyTorch, rows first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """Result of `inspect_model`.

    facts: by section; None where it could not be read. refused: (section, the line that an export ends with).
    tokenizer: as a bundle would get it, if it can.
    """

    facts: Mapping[str, Any]
    refused: tuple[tuple[str, str], ...]
    tokenizer: SourceTokenizer | None

    def to_json(self) -> str:
        """Write all facts and refusals."""
        refused = [{"section": section, "reason": reason} for section, reason in self.refused]
        return json.dumps({**self.facts, "refused": refused}, indent=1, ensure_ascii=False) + "\n"


def inspect_model(source: str) -> ModelReport:
    """Read what can be read of a folder, a ``.gguf`` file or an id of the Hub.

    A probe of the model itself may refuse more; that is not seen here.

    Raises: UsageError if there is no such model.
    """
    import transformers  # noqa: F401 - if it is missing, that is no fault of the model

    origin = locate(source)
    refused: list[tuple[str, str]] = []

    def read(section: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SinkError as error:
            reason = str(error)
        except Exception as error:  # values of other types than they should be: transformers has errors of its own
            reason = str(
                problem(
                    section,
                    received=f"{type(error).__name__} ({one_line(error)})",
                    expected="values of the usual types",
                    fix="repair the model's files",
                )
            )
        if (section, reason) not in refused:
            refused.append((section, reason))
        return None

    config = read("config", _readable_config, source)
    if config is not None:
        read("config", refuse_architecture, config)
    tensors = read("tensors", model_tensors, origin)
    if tensors is not None and config is not None and not refused:
        read("tensors", check_tensors, origin, config)
    loaded = read("tokenizer", load_tokenizer, source)
    rows = _embedding_rows(tensors or (), config)
    if config is None and tensors is None and loaded is None:  # nothing at all: the first reason is what matters
        raise UsageError(refused[0][1])
    tokenizer = loaded if loaded is None else read("tokenizer", _fitted, loaded, rows, config)
    generation = read("generation config", load_generation_config, source)
    facts: Facts = {
        "name": origin.name,
        "source": source,
        "format": "GGUF" if origin.is_gguf else "folder" if origin.path is not None else "Hub",
        "model": None if config is None else read("config", model_facts, config),
        "tensors": None if tensors is None else tensor_facts(tensors),
        "positions": None if config is None else read("config", position_facts, config),
        "windows": None if config is None else read("config", window_facts, config),
        "tokenizer": None,
    }
    if loaded is not None:
        facts["tokenizer"] = read("tokenizer", tokenizer_facts, tokenizer or loaded)
    if config is not None:
        facts["ends"] = read("ends of a turn", end_facts, tokenizer or loaded, config, generation, rows)
    for one in (loaded, tokenizer):
        if one is not None:
            one.close()
    return ModelReport(facts, tuple(refused), tokenizer)


def model_facts(config: Any) -> Facts:
    """Read the sizes of the model from its configuration.

    latent: numbers that latent attention keeps of a token, and how many of them are the value; absent elsewhere.
    shared_layers: last layers that keep no cache, as they read an earlier layer's; absent elsewhere.
    """
    text = config.get_text_config()
    heads = _size(text, "num_attention_heads")
    width = getattr(text, "hidden_size", None)
    latent, turning, shared = (
        _size(text, name) for name in ("kv_lora_rank", "qk_rope_head_dim", "num_kv_shared_layers")
    )
    return {
        **({} if latent is None or turning is None else {"latent": (latent + turning, latent)}),
        **({} if shared is None else {"shared_layers": shared}),
        "family": text.model_type,
        "architecture": next(iter(getattr(config, "architectures", None) or ()), None),
        "num_layers": getattr(text, "num_hidden_layers", None),
        "num_q_heads": heads,
        "num_kv_heads": _size(text, "num_key_value_heads", heads),
        "head_dim": _size(text, "head_dim", width // heads if width and heads else None),
        "hidden_size": width,
        "vocab_size": getattr(text, "vocab_size", None),
        "max_positions": getattr(text, "max_position_embeddings", None),
    }


def _size(text: Any, name: str, default: int | None = None) -> int | None:
    """Read a size from a configuration; `default` if it has none, None if it differs by layer."""
    try:
        found = getattr(text, name, None) or default
    except Exception:  # transformers has an error of its own for what differs by layer
        return None
    return found if isinstance(found, int) else None


def position_facts(config: Any) -> Facts:
    """Read the kind of positions; where they are rotary, the frequencies' base, scaling and share of a head."""
    from sinkexport.families import describe

    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    known = next((family.positions for family in describe() if family.family == text.model_type), None)
    groups = {"all layers": parameters} if "rope_type" in parameters else parameters
    rope = []
    for layers, values in groups.items():
        if isinstance(values, dict) and values:
            rest = {name: value for name, value in values.items() if name not in ("rope_type", "rope_theta")}
            share = rest.pop("partial_rotary_factor", None) or getattr(text, "partial_rotary_factor", None)
            share = share or _latent_share(text)
            rope.append(
                {
                    "layers": layers,
                    "type": values.get("rope_type", "default"),
                    "theta": values.get("rope_theta"),
                    "rotary_share": share,
                    "scaling": rest,
                }
            )
    return {"known_as": known, "rope": rope}


def _latent_share(text: Any) -> float:
    """Compute the share of a query head that turns: one part of two in latent attention, all elsewhere."""
    turning, fixed = (_size(text, name) for name in ("qk_rope_head_dim", "qk_nope_head_dim"))
    return 1.0 if turning is None or fixed is None else turning / (turning + fixed)


def window_facts(config: Any) -> list[Facts]:
    """Count the layers by how far back they see. window: tokens; None: all.

    A configuration that has no heads of attention is that of a model of recurrent layers.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    window = getattr(text, "sliding_window", None)
    if not kinds:
        return [
            {
                "kind": _only_kind(text),
                "window": window or None,
                "layers": getattr(text, "num_hidden_layers", None),
            }
        ]
    counts = collections.Counter(kinds)
    return [
        {"kind": kind, "window": window if kind == "sliding_attention" else None, "layers": count}
        for kind, count in counts.items()
    ]


def _only_kind(text: Any) -> str:
    """Kind of all layers of a configuration that names none."""
    if getattr(text, "num_attention_heads", None) is None:
        return RECURRENT
    return "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"


def tensor_facts(tensors: tuple[Tensor, ...]) -> Facts:
    """Count tensors and bytes by type."""
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        entry = types.setdefault(tensor.dtype, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += tensor.nbytes
    return {"count": len(tensors), "bytes": sum(tensor.nbytes for tensor in tensors), "types": types}


def tokenizer_facts(tokenizer: SourceTokenizer) -> Facts:
    """Describe the kind, special tokens and chat template of a tokenizer."""
    from sinkrt.text.template_args import RESERVED_ARGS

    from sinkexport.loading.tokenizers.tokenizer_checks import check_template, system_refusal

    document = json.loads(tokenizer.library.to_str())
    special = {name: {"text": text, "id": tokenizer.token_id(text)} for name, text in tokenizer.special_tokens.items()}
    facts: Facts = {
        "read_from": tokenizer.kind,
        "type": document["model"]["type"],
        "normalizer": _kinds(document["normalizer"], "normalizers"),
        "pre_tokenizer": _kinds(document["pre_tokenizer"], "pretokenizers"),
        "num_tokens": tokenizer.num_tokens,
        "num_added_tokens": len(document["added_tokens"]),
        "special_tokens": special,
        "beginning": [{"id": number, "text": tokenizer.decode([number])} for number in tokenizer.beginning],
        "chat_template": None,
        "remarks": list(tokenizer.remarks),
    }
    if tokenizer.chat_template is not None:
        check_template(tokenizer)
        template = tokenizer.runtime.template_facts
        facts["chat_template"] = {
            "characters": len(tokenizer.chat_template),
            "wants": template.wants,
            "no_system_message": system_refusal(tokenizer),
            "keeps_history": template.keeps_history,
            "arguments": sorted(
                name
                for name in template.variables
                if name not in RESERVED_ARGS and not name.endswith(("_token", "_tokens"))
            ),
        }
    return facts


def end_facts(tokenizer: SourceTokenizer | None, config: Any, generation: Any, num_rows: int | None) -> list[Facts]:
    """List the ids that end a turn."""
    from sinkexport.loading.tokenizers.turn_ends import end_ids

    text = config.get_text_config()
    numbers = end_ids(tokenizer, text, generation, num_rows or text.vocab_size)
    return [{"id": number, "text": None if tokenizer is None else tokenizer.decode([number])} for number in numbers]


def model_tensors(origin: Origin) -> tuple[Tensor, ...] | None:
    """List the tensors of a model by the headers of its files; None where they would have to be downloaded.

    Raises: UsageError for files that are cut short or are none.
    """
    if origin.path is None:
        return None
    if origin.is_gguf:
        from sinkexport.loading.gguf_models.file import open_gguf

        return tuple(
            Tensor(
                name, tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape)), int(tensor.n_bytes)
            )
            for name, tensor in open_gguf(origin.path).tensors.items()
        )
    from sinkexport.loading.checkpoints.weight_files import read_weight_files

    tensors = read_weight_files(origin.path).tensors.values()
    return tuple(Tensor(one.name, one.dtype, one.shape, one.size * _itemsize(one.dtype)) for one in tensors)


def check_tensors(origin: Origin, config: Any) -> None:
    """Refuse tensors that are missing, unexpected or of another shape, as an export does, without reading them.

    Raises: UsageError.
    """
    from sinkexport.loading.checkpoints.checkpoint import check_checkpoint
    from sinkexport.loading.gguf_models.model import check_gguf

    with quiet_transformers():
        (check_gguf if origin.is_gguf else check_checkpoint)(origin, config)


def _itemsize(dtype: str) -> int:
    """Look up the bytes of an element of safetensors' or torch's type."""
    from sinkexport.loading.checkpoints.safetensors_reader import ELEMENTS

    return int(np.dtype(ELEMENTS.get(dtype, dtype)).itemsize)


def _readable_config(source: str) -> Any:
    return load_config(source, refuse=False)


def _fitted(tokenizer: SourceTokenizer, num_rows: int | None, config: Any) -> SourceTokenizer:
    from sinkexport.loading.tokenizers.tokenizer_checks import check_tokens, fitted, named

    fitting = tokenizer if num_rows is None else fitted(tokenizer, num_rows)
    fitting = fitting if config is None else named(fitting, config.get_text_config())
    check_tokens(fitting)
    return fitting


def _embedding_rows(tensors: tuple[Tensor, ...], config: Any) -> int | None:
    """Count the rows of the embedding by the weights, or by the configuration where they cannot be seen."""
    for tensor in tensors:
        if tensor.name.endswith(EMBEDDINGS) and len(tensor.shape) == 2:
            return tensor.shape[0]
    rows: int | None = None
    with contextlib.suppress(AttributeError):
        rows = config.get_text_config().vocab_size
    return rows


def _kinds(step: Mapping[str, Any] | None, parts: str) -> list[str]:
    """List the names of the steps of a tokenizer.json, sequences unfolded."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [kind for part in step[parts] for kind in _kinds(part, parts)]
    return [str(step["type"])]
