"""One contender of `decode_cpu.py` in a process of its own, driven by JSON lines.

A process each: thread pools of one contender cannot spin into the time of another, and each may live in an
environment of its own. Requests (standard input) and replies (standard output), one JSON object a line:

    {"op": "prefill", "ids": [...]}    ->  {"tokens": [first]}
    {"op": "steps", "count": n}        ->  {"ms": [...], "tokens": [...]}     greedy decoding, argmax included
    end of input                       ->  the process ends
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Protocol

from harness import peak_memory_mb


class Contender(Protocol):
    """Greedy decoding of one stream."""

    def prefill(self, ids: list[int]) -> int:
        """Start a stream with `ids`; the first new token."""

    def step(self, token: int) -> int:
        """Feed `token`, the last one returned; the next one."""


class Sinkexport:
    """A bundle in sinkrt.Session."""

    def __init__(self, path: str, threads: int, _max_length: int) -> None:
        import numpy as np
        from sinkrt import Session

        self._session = Session.load(path, backend="ort", threads=threads)
        self._ids = np.zeros(1, np.int64)  # [B=1]

    def prefill(self, ids: list[int]) -> int:
        import numpy as np

        self._session.reset()
        return int(self._session.prefill(np.array([ids], np.int64))[0].argmax())

    def step(self, token: int) -> int:
        self._ids[0] = token
        return int(self._session.step(self._ids)[0].argmax())


class Genai:
    """onnxruntime-genai's own generation loop."""

    def __init__(self, path: str, threads: int, max_length: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._og, self._model, self._max_length = og, og.Model(config), max_length
        self._generator: Any = None

    def prefill(self, ids: list[int]) -> int:
        params = self._og.GeneratorParams(self._model)
        # min_length: go on past an end-of-text token, as the others do.
        params.set_search_options(do_sample=False, max_length=self._max_length, min_length=self._max_length)
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(ids)
        return self._next()

    def step(self, _token: int) -> int:
        return self._next()  # it feeds its own last token

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


class Transformers:
    """Hugging Face transformers, eager PyTorch with a dynamic cache."""

    def __init__(self, path: str, threads: int, _max_length: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._cache: Any = None

    def prefill(self, ids: list[int]) -> int:
        self._cache = None
        return self._run([ids])

    def step(self, token: int) -> int:
        return self._run([[token]])

    def _run(self, ids: list[list[int]]) -> int:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return int(out.logits[0, -1].argmax())


CONTENDERS: dict[str, type[Any]] = {"sinkexport": Sinkexport, "genai": Genai, "transformers": Transformers}


def main() -> None:
    """Load the contender, say so, then answer requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CONTENDERS)
    parser.add_argument("path")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    arguments = parser.parse_args()

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies

    def reply(**message: object) -> None:
        print(json.dumps(message), file=replies, flush=True)

    contender: Contender = CONTENDERS[arguments.kind](arguments.path, arguments.threads, arguments.max_length)
    reply(ready=True)
    token = -1
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "prefill":
            token = contender.prefill(request["ids"])
            reply(tokens=[token])
            continue
        times_ms, tokens = [], []
        for _ in range(request["count"]):
            start = time.perf_counter()
            token = contender.step(token)
            times_ms.append((time.perf_counter() - start) * 1e3)
            tokens.append(token)
        reply(ms=times_ms, tokens=tokens, peak_mb=peak_memory_mb())


if __name__ == "__main__":
    main()
