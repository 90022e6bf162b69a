"""Models from GGUF files: transformers' classes, built from the file's metadata and filled with its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.gguf_models import dense, experts, fused, gemma
from sinkexport.loading.gguf_models.facts import Facts, refused
from sinkexport.loading.gguf_models.file import END_NAMES, GgufFile, open_gguf
from sinkexport.loading.gguf_models.plan import Plan
from sinkexport.loading.gguf_models.rope import check_rotation
from sinkexport.loading.gguf_models.tensors import check, fill

if TYPE_CHECKING:
    import torch

    from sinkexport.loading.origin import Origin

ARCHITECTURES: Mapping[str, Callable[[Facts], Plan]] = {
    "bloom": fused.bloom,
    "cohere2": dense.cohere2,
    "command-r": dense.command_r,
    "falcon": fused.falcon,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3,
    "glm4": dense.glm4,
    "gpt-oss": experts.gpt_oss,
    "gptneox": fused.gptneox,
    "granite": dense.granite,
    "llama": dense.llama,
    "minimax-m2": experts.minimax_m2,
    "mpt": fused.mpt,
    "nemotron": dense.nemotron,
    "olmo": dense.olmo,
    "olmo2": dense.olmo2,
    "phi2": dense.phi2,
    "phi3": dense.phi3,
    "qwen2": dense.qwen2,
    "qwen2moe": experts.qwen2moe,
    "qwen3": dense.qwen3,
    "qwen3moe": experts.qwen3moe,
    "smollm3": dense.smollm3,
    "stablelm": dense.stablelm,
    "starcoder2": dense.starcoder2,
}
"""Plan of each ``general.architecture``."""

NEVER_EXPORTED: Mapping[str, str] = {
    "gpt2": "learns a vector for each absolute position",
    "starcoder": "learns a vector for each absolute position",
    "mamba": "has no attention",
    "mamba2": "has no attention",
    "t5": "is an encoder-decoder",
    "bert": "is an encoder",
}
"""Architectures that no bundle could be made of, and why."""


def gguf_config(origin: Origin) -> Any:
    """transformers' configuration of a GGUF file.

    Raises: UsageError for what cannot be read exactly: an architecture, a key or a value.
    """
    return _config(_plan(_facts(origin)))


def load_gguf(origin: Origin, config: Any, dtype: torch.dtype) -> Any:
    """The model of a GGUF file with weights in `dtype`. config: that of `gguf_config`, perhaps with changes.

    Raises: UsageError for a tensor without a place, a parameter without a tensor, and shapes that are not as expected.
    """
    import transformers
    from transformers.initialization import no_init_weights

    facts = _facts(origin)
    plan = _plan(facts)
    _check_tensors(facts, plan, config, dtype)
    build = transformers.AutoModelForCausalLM.from_config
    with no_init_weights():  # memory is taken as it is filled
        model = build(config, dtype=dtype)
    if "rope_parameters" in plan.arguments:
        check_rotation(model, plan.arguments["rope_parameters"], plan.head_dim)
    model.tie_weights()
    fill(model, facts, plan.modules, plan.rules)
    ends = stated_end_ids(facts.file)
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends) or None
    return model


def check_gguf(origin: Origin, config: Any) -> None:
    """Refuse what `load_gguf` would of a file's tensors, from their names and shapes alone.

    Raises: UsageError as `load_gguf`.
    """
    import torch

    facts = _facts(origin)
    _check_tensors(facts, _plan(facts), config, torch.float32)


def _check_tensors(facts: Facts, plan: Plan, config: Any, dtype: torch.dtype) -> None:
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        outline = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    outline.tie_weights()
    check(outline, facts, plan.modules, plan.rules, plan.used)


def stated_end_ids(file: GgufFile) -> tuple[int, ...]:
    """Ids of `END_NAMES` in the file's metadata, each once; none if it names none.

    The vocabulary knows further ends by their texts (tokenizers/gguf_vocab.py); a model without a tokenizer has these.
    """
    values = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in END_NAMES)
    return tuple(dict.fromkeys(value for value in values if type(value) is int and 0 <= value < 0xFFFFFFFF))


def _facts(origin: Origin) -> Facts:
    if origin.path is None:
        raise UsageError(
            problem(
                "model", received=f"'{origin.source}'", expected="a GGUF file on this machine", fix="download it first"
            )
        )
    file = open_gguf(origin.path)
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise refused(f"a GGUF file of type {kind!r:.40}", "a model", "name the model's own file")
    name = file.architecture
    if not name:
        raise refused("a GGUF file without 'general.architecture'", "the metadata of a model")
    if name not in ARCHITECTURES:
        reason = NEVER_EXPORTED.get(name)
        raise refused(
            f"architecture '{name}'" + (f", which {reason}" if reason else ""),
            f"one of {', '.join(ARCHITECTURES)}",
            "export its checkpoint folder",
        )
    return Facts(file)


def _plan(facts: Facts) -> Plan:
    """Plan of a file, with every key of its metadata accounted for."""
    name = facts.architecture
    if name == "llama" and facts.count("expert_count", 0, least=0) > 0:
        plan = experts.mixtral(facts)
    else:
        plan = ARCHITECTURES[name](facts)
    facts.expect_all_read()
    return plan


def _config(plan: Plan) -> Any:
    import transformers

    config_class = getattr(transformers, plan.config_class)
    try:
        config = config_class(**plan.arguments)
    except Exception as error:  # TypeError, ValueError and its own kinds: what its checks of single values raise
        reason = " ".join(str(error).split())[:200]
        raise refused(f"metadata that {plan.config_class} refuses ({reason})", "values of the model") from error
    model_class = transformers.AutoModelForCausalLM._model_mapping[config_class]
    config.architectures = [model_class.__name__]
    return config
