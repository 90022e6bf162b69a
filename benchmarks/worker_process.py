"""One decoder in a process of its own, driven by JSON lines.

A process each: thread pools of one decoder cannot spin into the time of another, and each may live in an
environment of its own. Requests (standard input) and replies (standard output), one JSON object a line:

    when the model is loaded                     ->  {"packages": {name: version}}
    {"op": "prefill", "ids": [...], "limit": n}  ->  {"ms": [t], "tokens": [first], "peak_mb": m}
    {"op": "steps", "count": n}                  ->  {"ms": [...], "tokens": [...], "peak_mb": m}
    end of input                                 ->  the process ends

A decoder that generates by itself (`TimedDecoder`) replies without the tokens that it does not report.

Decoding is greedy, argmax included. A library's error is a reply too: {"error": "first line"}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from baselines import DECODERS, Decoder, Setup, TimedDecoder
from harness import peak_memory_mb, versions


def main() -> None:
    """Load the decoder, report that, then answer requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=DECODERS)
    parser.add_argument("path")
    for option in ("threads", "capacity", "sinks"):
        parser.add_argument(f"--{option}", type=int, required=True)
    arguments = parser.parse_args()

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies

    def reply(**message: object) -> None:
        print(json.dumps(message), file=replies, flush=True)

    setup = Setup(arguments.path, arguments.threads, arguments.capacity, arguments.sinks)
    decoder: Decoder | TimedDecoder = DECODERS[arguments.kind](setup)
    reply(packages=versions())
    token = -1
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["op"] == "prefill":
                times_ms, tokens = _timed([lambda _, r=request: decoder.prefill(r["ids"], r["limit"])], token)
            elif hasattr(decoder, "steps"):
                times_ms, tokens = decoder.steps(request["count"]), []
            else:
                times_ms, tokens = _timed([decoder.step] * request["count"], token)
        except Exception as error:  # what a decoder does past its limits is a result
            reply(error=(str(error).strip() or type(error).__name__).splitlines()[0])
            continue
        token = tokens[-1] if tokens else -1
        reply(ms=times_ms, tokens=tokens, peak_mb=peak_memory_mb())


def _timed(work: list[Callable[[int], Any]], token: int) -> tuple[list[float], list[int]]:
    """Call one after the other, each with the last one's token; milliseconds and tokens."""
    times_ms, tokens = [], []
    for call in work:
        start = time.perf_counter()
        token = call(token)
        times_ms.append((time.perf_counter() - start) * 1e3)
        if token is not None:
            tokens.append(token)
    return times_ms, tokens


if __name__ == "__main__":
    main()
