"""One decoder of `endless.py` in a process of its own: decodes until its limit, and prints a JSON line a bucket.

    {"end": tokens so far, "median_ms": .., "p99_ms": .., "max_ms": .., "resident_mb": ..}
    {"ended": why, "load_s": seconds, "whole": {the three times over all tokens}, "packages": {name: version}}

Times are those between two tokens as a caller sees them. Resident memory is the whole process, the model included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from baselines import Setup, Transformers
from harness import resident_mb, versions

FIRST_TOKEN = 1


class Recorder:
    """Times of tokens, in buckets. Files are of `bucket` tokens; what is left at the end is a smaller bucket."""

    def __init__(self, bucket: int, tokens: int, seconds: float, report: Callable[[dict[str, Any]], None]) -> None:
        self._bucket, self._tokens, self._seconds, self._report = bucket, tokens, seconds, report
        self._times_ms: list[float] = []
        self._reported = 0
        self._start = self._last = time.perf_counter()
        self.ended = ""

    def start(self) -> None:
        """The clock starts: the decoder is loaded."""
        self._start = self._last = time.perf_counter()

    def token(self, count: int = 1) -> bool:
        """Note `count` tokens that came together; whether the run goes on."""
        now = time.perf_counter()
        self._times_ms += [(now - self._last) * 1e3 / count] * count
        self._last = now
        while len(self._times_ms) - self._reported >= self._bucket:
            self._flush(self._reported + self._bucket)
        if len(self._times_ms) >= self._tokens:
            self.ended = "tokens"
        elif now - self._start >= self._seconds:
            self.ended = "seconds"
        if self.ended:
            self._flush(len(self._times_ms))  # here, while the decoder still holds its memory
        return not self.ended

    def close(self) -> dict[str, float]:
        """Report what is left; the figures over all tokens."""
        self._flush(len(self._times_ms))
        return _figures(self._times_ms)

    def _flush(self, end: int) -> None:
        if end == self._reported:
            return
        figures = _figures(self._times_ms[self._reported : end])
        self._report({"end": end, **figures, "resident_mb": round(resident_mb(), 1)})
        self._reported = end


def _figures(times_ms: list[float]) -> dict[str, float]:
    ordered = np.sort(times_ms)
    p99 = ordered[int(np.ceil(0.99 * len(ordered))) - 1]  # nearest rank: a time that was measured
    median = float(np.median(ordered))
    return {"median_ms": round(median, 3), "p99_ms": round(float(p99), 3), "max_ms": round(float(ordered[-1]), 3)}


def run_sinkexport(setup: Setup, recorder: Recorder) -> None:
    """A bundle, step by step. There is no prompt, so nothing is repacked for prefill."""
    from sinkrt import Session

    with Session.load(setup.path, backend="ort", threads=setup.threads, repack_prefill=False) as session:
        ids = np.array([FIRST_TOKEN], np.int64)  # [B=1]
        recorder.start()
        going = True
        while going:
            ids[0] = session.step(ids)[0].argmax()
            going = recorder.token()


def run_transformers(setup: Setup, recorder: Recorder) -> None:
    """Transformers with its dynamic cache, which grows by one token a step."""
    decoder, token = Transformers(setup), FIRST_TOKEN
    recorder.start()
    going = True
    while going:
        token = decoder.step(token)
        going = recorder.token()


def run_llamacpp(setup: Setup, recorder: Recorder) -> None:
    """llama.cpp's own server loop in this process, with context shift: one endless answer.

    Weights and cache in F32, greedy, without flash attention, whose CPU kernel computes in half precision.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = setup.path
    settings.n_ctx, settings.n_parallel, settings.n_keep = setup.capacity, 1, setup.sinks
    settings.ctx_shift, settings.warmup, settings.fit_params, settings.verbosity = True, False, False, -1
    settings.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE  # read whole, so that the model is resident
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = setup.threads
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    seen = 0

    def on_chunk(chunk: dict[str, Any]) -> bool:
        nonlocal seen
        count = chunk.get("timings", {}).get("predicted_n", seen) - seen
        seen += max(count, 0)
        return count > 0 and not recorder.token(count)  # True stops the answer

    request = {"prompt": [FIRST_TOKEN], "n_predict": 2**31 - 1, "n_keep": setup.sinks, "stream": True}
    greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True, "cache_prompt": False}
    recorder.start()
    server.handle_completions({**request, **greedy, "timings_per_token": True}, on_chunk)


RUNS = {"sinkexport": run_sinkexport, "transformers": run_transformers, "llamacpp": run_llamacpp}


def main() -> None:
    """Decode until the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("path")
    for option in ("threads", "capacity", "sinks", "bucket", "tokens"):
        parser.add_argument(f"--{option}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the lines

    def report(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=lines, flush=True)

    recorder = Recorder(arguments.bucket, arguments.tokens, arguments.seconds, report)
    setup = Setup(arguments.path, arguments.threads, arguments.capacity, arguments.sinks)
    error = ""
    try:
        RUNS[arguments.name](setup, recorder)
    except Exception as problem:  # what a decoder does past its limits is a result
        error = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    whole = recorder.close()
    report({"ended": recorder.ended or error or "itself", "whole": whole, "packages": versions()})


if __name__ == "__main__":
    main()
