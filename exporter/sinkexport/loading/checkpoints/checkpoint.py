"""Models from folders (and ids of the Hub)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.checkpoints.file_tensor import FLOATING, FileTensor
from sinkexport.loading.checkpoints.loading_report import (
    adapter_refused,
    refuse_gaps,
    refuse_incomplete,
    refuse_numbers,
)
from sinkexport.loading.checkpoints.padding_rows import restore_padding_rows
from sinkexport.loading.checkpoints.remote_code import code_note
from sinkexport.loading.checkpoints.rescaled_layers import keep_saved_weights
from sinkexport.loading.checkpoints.weight_files import WeightFiles, read_json, read_weight_files
from sinkexport.loading.stored.folder import quantization_of, with_stored
from sinkexport.loading.tokenizers.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    import torch

    from sinkexport.loading.origin import Origin

LOGGER = logging.getLogger("sinkexport")
CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def checkpoint_config(origin: Origin) -> Any:
    """transformers' configuration of a model folder, without what only says how its author ran the model.

    Raises: UsageError for a broken config.json or generation_config.json, an adapter, or a model that needs code of
    its own.
    """
    import transformers

    if origin.path is not None:
        _check_facts(origin)
    config = transformers.AutoConfig.from_pretrained(**origin.location, trust_remote_code=False)
    if origin.path is None:
        _refuse_quantized_id(origin, config)
    _make_neutral(config)
    return config


def _refuse_quantized_id(origin: Origin, config: Any) -> None:
    """Raises: UsageError for a quantised model of the Hub, whose files must be here to be read."""
    if any(getattr(part, "quantization_config", None) is not None for part in _with_parts(config)):
        raise UsageError(
            problem(
                "model",
                received=f"'{origin.source}', whose weights are quantised",
                expected="its folder",
                fix=f"run 'hf download {origin.source} --local-dir DIR' first",
            )
        )


def checkpoint_notes(origin: Origin) -> list[str]:
    """Notes for the user on a folder before it is loaded, a line each.

    Raises: UsageError as `checkpoint_config`.
    """
    if origin.path is None or origin.is_gguf:
        return []
    note = code_note(origin.source, read_json(origin.path / CONFIG))
    return [] if note is None else [note]


def load_checkpoint(origin: Origin, config: Any, dtype: torch.dtype) -> Any:
    """The model of a folder with weights in `dtype`, every tensor of its files in its place.

    Raises: UsageError naming files that are damaged and tensors that are missing, unexpected, of another shape or
    there twice.
    """
    import transformers

    files, ids = None if origin.path is None else _weights(origin.path, config), generation_ids(origin)
    location, family = origin.location, transformers.AutoModelForCausalLM
    if origin.path is not None and quantization_of(origin.path) is not None and files is not None:
        # transformers' own readers need kernels, or round each product to the type of its scale.
        location = {"pretrained_model_name_or_path": None, "state_dict": _as_torch(files.tensors)}
        family = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = family.from_pretrained(
        **location,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, by name
        **({"trust_remote_code": False, "generation_config": ids} if location is origin.location else {}),
    )
    if ids is not None:
        model.generation_config = ids
    files = files or _weights(weights_folder(origin), config)
    refuse_incomplete(model, info, files.tensors)
    restore_padding_rows(model, files.tensors)
    keep_saved_weights(model)
    _say_if_untied(model, config)
    return model


def _as_torch(tensors: Mapping[str, FileTensor]) -> dict[str, torch.Tensor]:
    """The numbers of all tensors, floating-point ones in float32, which holds every type exactly."""
    import numpy as np
    import torch

    def numbers(tensor: FileTensor) -> torch.Tensor:
        array = tensor.array()
        is_floating = tensor.dtype in FLOATING
        return torch.from_numpy(np.array(array, np.float32 if is_floating else array.dtype))

    return {name: numbers(tensor) for name, tensor in tensors.items()}


def _say_if_untied(model: Any, config: Any) -> None:
    """Warn of an output projection that differs from the embedding although config.json ties the two.

    transformers uses it all the same; other programs use the embedding.
    """
    head = model.get_output_embeddings()
    is_tied = head is None or head.weight is model.get_input_embeddings().weight
    if getattr(config.get_text_config(), "tie_word_embeddings", False) and not is_tied:
        LOGGER.warning(
            "config.json says tie_word_embeddings, and the weights have an output projection that differs "
            "from the embedding: it is used as it is"
        )


def generation_ids(origin: Origin) -> Any | None:
    """The ids of generation_config.json, and nothing else of it: transformers refuses models whose author's settings
    for sampling it no longer takes. None if there is no such file.

    Raises: UsageError if it is no JSON object.
    """
    import transformers

    path = TokenizerFiles(origin).path(GENERATION)
    if path is None:
        return None
    facts = read_json(path)
    found = transformers.GenerationConfig(**{name: facts[name] for name in IDS if facts.get(name) is not None})
    found._from_model_config = facts.get("_from_model_config") is True  # ids that nobody stated
    return found


def check_checkpoint(origin: Origin, config: Any) -> None:
    """Refuse what `load_checkpoint` would, from the headers of the files alone: a model without memory is filled.

    Raises: UsageError as `load_checkpoint`.
    """
    import torch
    import transformers

    if origin.path is None:
        return
    files = _weights(origin.path, config)
    outlines = {name: torch.empty(tensor.shape, device="meta") for name, tensor in files.tensors.items()}
    family = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = family.from_pretrained(
        None,
        config=config,
        state_dict=outlines,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    refuse_incomplete(model, info, files.tensors)


def weights_folder(origin: Origin) -> Path:
    """The folder of a model that has been loaded: its own, or the one that the Hub's cache has of it."""
    if origin.path is not None:
        return origin.path
    from transformers.utils import cached_file

    return Path(cached_file(origin.source, CONFIG)).parent


def _weights(folder: Path, config: Any) -> WeightFiles:
    files = read_weight_files(folder, getattr(config, "transformers_weights", None))
    files = dataclasses.replace(files, tensors=with_stored(files.tensors, quantization_of(folder)))
    refuse_numbers(files.tensors)
    has_identities = bool(getattr(config, "zero_expert_num", None))
    refuse_gaps(files.tensors, config.n_routed_experts if has_identities else None)
    return files


def _check_facts(origin: Origin) -> None:
    """Refuse what transformers would ignore silently or stop at with an error of its own."""
    folder = origin.path
    if folder is None:
        return
    if (folder / ADAPTER).is_file():
        raise adapter_refused(origin.source)
    code_note(origin.source, read_json(folder / CONFIG))
    quantization_of(folder)
    if not (folder / GENERATION).is_file():
        return
    facts = read_json(folder / GENERATION)
    for name in IDS:
        value = facts.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(one, int) or isinstance(one, bool) for one in ids):
            raise UsageError(
                problem(
                    f"'{GENERATION}'", received=f"{name} {value!r}", expected="ids of tokens", fix="correct the file"
                )
            )


def _make_neutral(config: Any) -> None:
    """Undo what changes how a model is run and not what it computes: it was saved with the author's settings.

    attn_implementation may name a package that is not there; tuples in the place of results, or attention weights, are
    not what an export reads; padding_idx outside the vocabulary stops torch, and no padding is ever embedded;
    rescale_prenorm_residual is for training, and transformers divides loaded weights of Mamba layers by it.
    """
    for part in _with_parts(config):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config  # its tensors are read here, as loading/stored says
        part._attn_implementation = None
        part.output_attentions = False
        for name, value in (
            ("return_dict", True),
            ("output_hidden_states", False),
            ("use_cache", True),
            ("torchscript", False),
            ("_experts_implementation", None),
            ("gradient_checkpointing", False),
            ("rescale_prenorm_residual", False),
        ):
            if hasattr(part, name):
                setattr(part, name, value)
        pad, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(size, int) and not 0 <= pad < size:
            part.pad_token_id = None


def _with_parts(config: Any) -> list[Any]:
    """A configuration and those inside it, such as the text model's."""
    names = getattr(type(config), "sub_configs", {})
    parts = [part for name in names if (part := getattr(config, name, None)) is not None]
    return [config, *(inner for part in parts if hasattr(part, "to_dict") for inner in _with_parts(part))]
