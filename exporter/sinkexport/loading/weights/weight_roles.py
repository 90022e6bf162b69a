"""Roles of weights by their names in any of the usual conventions: two names of one weight must agree."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from sinkexport.loading.checkpoints.file_tensor import Indices

ROLES: Mapping[str, tuple[str, ...]] = {
    "query": ("q_proj", "attn_q", "wq"),
    "key": ("k_proj", "attn_k", "wk"),
    "value": ("v_proj", "attn_v", "wv"),
    "output": ("o_proj", "attn_output", "wo"),
    "gate": ("gate_proj", "ffn_gate", "ffn_gate_exps", "w1"),
    "up": ("up_proj", "ffn_up", "ffn_up_exps", "w3"),
    "down": ("down_proj", "ffn_down", "ffn_down_exps", "w2"),
    "embedding": ("embed_tokens", "token_embd", "wte", "word_embeddings"),
    "head": ("lm_head", "output", "embed_out"),
}
"""Role -> components of names, as Hugging Face's, Mistral's and llama.cpp's files have them."""

_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
FUSED = re.compile(r"gate_up_proj")
LLAMA_ORDER = frozenset(
    (
        "llama",
        "deci",
        "granite",
        "granitemoe",
        "granitehybrid",
        "minicpm",
        "arcee",
        "smollm3",
        "mistral3",
        "apertus",
        "internlm2",
        "baichuan",
        "xverse",
        "olmo",
    )
)
"""GGUF architectures whose queries and keys have the two numbers of a rotated pair side by side. Hugging Face's files
have a head's first half before the second. Source: llama.cpp, ``convert_hf_to_gguf.py``, ``permute``."""


def role_of(name: str) -> str | None:
    """The role of a weight, by the last component of its name that has one."""
    parts = [part for part in name.split(".") if part in _ROLE_OF]
    return _ROLE_OF[parts[-1]] if parts else None


def roles_agree(file_name: str, parameter: str, half: int | None) -> bool:
    """Whether a tensor of a file may be this parameter of the model, or the first or second half of it.

    Names without a known role agree with everything.
    """
    one, other = role_of(file_name), role_of(parameter)
    if FUSED.search(parameter) and one is not None:
        return one in (("gate", "up") if half is None else (("gate", "up")[half],))
    return one is None or other is None or one == other


def rows_of_halves(num_heads: int, num_rows: int) -> Indices:
    """Places of the rows of queries or keys [num_rows, K] in a GGUF file of `LLAMA_ORDER`, in Hugging Face's order."""
    places = np.arange(num_rows, dtype=np.int64).reshape(num_heads, -1, 2)  # head, pair, half
    return places.transpose(0, 2, 1).reshape(-1)
