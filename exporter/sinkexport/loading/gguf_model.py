"""Models from GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sinkexport.sources import Origin


def gguf_config(origin: Origin) -> Any:
    """transformers' configuration of a GGUF file."""
    import transformers

    return transformers.AutoConfig.from_pretrained(**origin.location, trust_remote_code=False)


def load_gguf(origin: Origin, config: Any, dtype: torch.dtype) -> Any:
    """The model of a GGUF file with weights in `dtype`."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        **origin.location, config=config, dtype=dtype, trust_remote_code=False
    )
