"""Comparison of a loaded model with its files: a tensor too many or too few is a reason to refuse.

transformers fills what is missing with random numbers or ones and drops what it has no place for. It turns integers
into floating point without their scales, and hides names that a family asks it to ignore.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.checkpoints.file_tensor import FLOATING, FileTensor
from sinkexport.loading.checkpoints.no_effect import TABLE, why_no_effect
from sinkexport.loading.checkpoints.weight_files import listed

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.", "language_model.")
ADAPTER = re.compile(r"\.base_layer\.|lora_(A|B|embedding|magnitude)|\.modules_to_save\.|\.original_module\.")
SCALES = re.compile(r"(scale|scales|scale_inv|qweight|qzeros|g_idx|absmax|quant_map|quant_state|weight_packed|SCB)\b")
EXPERT = re.compile(r"^(?P<list>.+\.experts)\.(?P<number>\d+)\.(?P<rest>.+)$")
MERGE = "merge it first: PEFT's merge_and_unload(), then save_pretrained() into a new folder"


def refuse_numbers(tensors: Mapping[str, FileTensor]) -> None:
    """Refuse integers and FP8 numbers, which are worth nothing without their scales. For models that say nothing of
    quantisation in their configuration.

    Raises: UsageError naming them.
    """
    buffers = [entry.names for entry in TABLE if not entry.family]
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOATING and not any(pattern.search(name) for pattern in buffers)
    ]
    if odd:
        raise UsageError(
            problem(
                "weights",
                received=f"{listed(odd)} of type {tensors[odd[0]].dtype}, and no quantization_config in config.json",
                expected="floating-point weights",
                fix="export the original floating-point model",
            )
        )


def refuse_gaps(names: Iterable[str], num_experts: int | None = None) -> None:
    """Refuse lists of experts with gaps: transformers names only what it makes of all of them.

    num_experts: of each list; those after them are the identity (LongCat-Flash), and need no weights. None: all.

    Raises: UsageError naming the tensors that are missing.
    """
    experts: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := EXPERT.match(name):
            experts[match["list"]][int(match["number"])].add(match["rest"])
    missing = []
    for path, found in experts.items():
        everything = set().union(*found.values())
        missing += [
            f"{path}.{number}.{rest}"
            for number in range(max(found) + 1 if num_experts is None else num_experts)
            for rest in sorted(everything - found.get(number, set()))
        ]
    if missing:
        raise _refused("missing", missing, ())


def refuse_incomplete(model: Any, info: Mapping[str, Any], tensors: Mapping[str, FileTensor]) -> None:
    """Refuse a model whose tensors are not those of its files.

    info: transformers' loading info. tensors: of the files, as they were read without it.

    Raises: UsageError naming the tensors that are missing, have another shape, or that the model has no place for.
    """
    missing = sorted({*info["missing_keys"], *_hidden_missing(model, tensors)})
    if missing:
        raise _refused("missing", missing, tensors, _without_effect_aside(info["unexpected_keys"], tensors, model))
    if info["mismatched_keys"]:
        shapes = [
            f"{name} {list(there)} for {list(wanted)}"
            for name, there, wanted in sorted(info["mismatched_keys"], key=lambda entry: str(entry[0]))
        ]
        raise UsageError(
            problem(
                "weights",
                received=f"shapes that do not fit: {listed(shapes)}",
                expected="what config.json says",
                fix="use the model's own config.json",
            )
        )
    unexpected = _without_effect_aside({*info["unexpected_keys"], *_hidden_unexpected(model, tensors)}, tensors, model)
    if unexpected:
        raise _refused("unexpected", unexpected, tensors)
    if info["error_msgs"]:
        raise UsageError(
            problem(
                "weights",
                received=str(info["error_msgs"][0]).strip().splitlines()[0],
                expected="tensors that fit",
                fix="use a complete model folder",
            )
        )


def _hidden_missing(model: Any, tensors: Mapping[str, FileTensor]) -> set[str]:
    """Parameters that the files lack and that the family asks transformers not to report."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    return {
        name
        for name in model.state_dict()
        if any(p.search(name) for p in patterns) and not any(there in tensors for there in _spellings(name, model))
    }


def _hidden_unexpected(model: Any, tensors: Mapping[str, FileTensor]) -> set[str]:
    """Tensors that transformers drops silently: those that the family declares, and a few names of all families."""
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    patterns += [re.compile(pattern) for pattern in (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")]
    own = model.state_dict()
    return {
        name
        for name in tensors
        if any(p.search(name) for p in patterns) and not any(there in own for there in _spellings(name, model))
    }


def _spellings(name: str, model: Any) -> tuple[str, ...]:
    """A name with and without the base model's in front."""
    prefix = f"{model.base_model_prefix}."
    return name, f"{prefix}{name}", name.removeprefix(prefix)


def _without_effect_aside(names: Collection[str], tensors: Mapping[str, FileTensor], model: Any) -> list[str]:
    """Names that are left when those without effect are taken away. Some are not spelled as in the file."""
    left = []
    for name in sorted(names):
        there = next((tensors[spelling] for spelling in _spellings(name, model) if spelling in tensors), None)
        if there is None or why_no_effect(there, model) is None:
            left.append(name)
    return left


def _refused(what: str, names: Sequence[str], tensors: Collection[str], unexpected: Sequence[str] = ()) -> UsageError:
    seen = [*names, *unexpected, *tensors]
    received = f"{len(names)} {what}: {listed(names)}"
    if unexpected:
        received += f" (and {len(unexpected)} of no use: {listed(unexpected)})"
    return UsageError(
        problem(
            "weights",
            received=received,
            expected="the tensors that config.json asks for, no others",
            fix=_advice(what, seen),
        )
    )


def _advice(what: str, names: Sequence[str]) -> str:
    if any(ADAPTER.search(name) for name in names):
        return f"an adapter is not merged: {MERGE}"
    if any(SCALES.search(name) for name in names):
        return "quantised weights cannot be read: export the original floating-point model"
    wrapper = next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in names)), None)
    if wrapper is not None:
        return f"save the model itself, without the wrapper that calls it '{wrapper[:-1]}'"
    if what == "unexpected":
        return "use the model's own config.json, or save the model again with save_pretrained()"
    return "download or save the model again"


def adapter_refused(source: str) -> UsageError:
    """A folder with an adapter, whose weights transformers would leave out or ask another package for."""
    return UsageError(
        problem(
            "model",
            received=f"'{source}', which has an adapter (adapter_config.json)",
            expected="a whole model",
            fix=MERGE,
        )
    )
