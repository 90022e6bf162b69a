"""Code that lies in a model's folder is never run, whatever stdin says: transformers' own classes are used, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkrt.errors import UsageError, problem


def code_note(source: str, facts: Mapping[str, Any]) -> str | None:
    """Note on a model that comes with code of its own; None: it does not.

    facts: config.json.

    Raises: UsageError if transformers has no class of its own for it.
    """
    auto_map = facts.get("auto_map")
    if not auto_map:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    family = facts.get("model_type")
    wanted = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    builtin = CLASSES.get(family) if isinstance(family, str) else None
    if builtin is None:
        names = facts.get("architectures") or [wanted or "?"]
        raise UsageError(
            problem(
                "model",
                received=f"'{source}', whose code ({wanted or auto_map}) is not run: transformers has no "
                f"{names[0] if isinstance(names, list) else names} of its own for model_type '{family}'",
                expected="a family that transformers knows",
                fix="look for a copy of the model in transformers' own format (often with '-hf' in its name)",
            )
        )
    names = builtin if isinstance(builtin, str) else builtin[0]
    return f"note: '{source}' has code of its own ({wanted or 'auto_map'}), which is not run; transformers' {names} is"
