"""Models from folders (and ids of the Hub)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sinkexport.sources import Origin


def checkpoint_config(origin: Origin) -> Any:
    """transformers' configuration of a model folder."""
    import transformers

    return transformers.AutoConfig.from_pretrained(**origin.location)


def load_checkpoint(origin: Origin, config: Any, dtype: torch.dtype) -> Any:
    """The model of a folder with weights in `dtype`."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(**origin.location, config=config, dtype=dtype)
