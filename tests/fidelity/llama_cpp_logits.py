"""llama.cpp's own probabilities, from its server in this process (the wheel `xllamacpp`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

PROMPT = [1, 17, 42, 8, 90, 33, 61, 5, 77, 24, 50, 12, 66, 39]
"""Longer than the windows of the tiny models."""


def log_probabilities(path: Path, prompt: list[int], num_steps: int, vocab_size: int) -> tuple[list[int], np.ndarray]:
    """Ids that llama.cpp chooses after `prompt`, and the log probabilities before each: float64 [num_steps, vocab].

    Attention in float32 without flash attention, keys and values stored in float32.
    """
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 256, 1, False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.fit_params = False
    server = xllamacpp.Server(settings)
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": num_steps,
            "n_probs": vocab_size,
            "temperature": 0.0,
            "ignore_eos": True,
            "post_sampling_probs": False,
            "cache_prompt": False,
        }
    )
    return _read(answer, num_steps, vocab_size)


def _read(answer: dict[str, Any], num_steps: int, vocab_size: int) -> tuple[list[int], np.ndarray]:
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == num_steps
    table = np.full((num_steps, vocab_size), np.nan)
    for row, step in zip(table, content, strict=True):
        for token in step["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return [step["id"] for step in content], table
