"""Memory over a million steps: whether anything grows from token to token.

    python benchmarks/steady_memory.py BUNDLE [--steps 1000000] [--every 100000] [--prompt-every 1000] [--json FILE]

A tiny bundle is best: what grows does so by the step, whatever the model's size. All streams step together; every
`--prompt-every` steps a prompt of one to three chunks is fed in between. Growth is counted from the end of the first
`--warm-up` steps, in which allocators settle.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import anonymous_mb, check_json, environment, resident_mb, table, where, write_json
from sinkrt import Session

KIB_A_MB = 1e6 / 1024


def run(session: Session, steps: int, every: int, prompt_every: int, warm_up: int) -> list[dict[str, Any]]:
    """Memory in MB after each `every` steps, the first entry after the warm-up; what was fed until then.

    resident_mb: with pages of files, libraries among them, which the system drops and reads again as it likes.
    allocated_mb: without.
    """
    random = np.random.default_rng(0)
    ids = np.ones(session.batch, np.int64)
    tokens = 0
    out = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        ids[:] = session.step(ids).argmax(axis=1)
        tokens += 1
        if step % prompt_every == 0:
            length = int(random.integers(1, 3 * session.chunk_size + 1))
            prompts = random.integers(0, session.manifest.model.vocab_size, (session.batch, length))
            ids[:] = session.prefill(prompts).argmax(axis=1)
            tokens += length
        if step == warm_up or step % every == 0:
            seconds = round(time.perf_counter() - start, 1)
            memory = {"resident_mb": resident_mb(), "allocated_mb": anonymous_mb()}
            out.append({"steps": step, "tokens": tokens, **memory, "seconds": seconds})
    return out


def show(result: dict[str, Any]) -> str:
    """The table for people."""
    points = result["points"]
    rows = []
    for before, point in zip([points[0], *points], points, strict=False):
        growth = ((point["allocated_mb"] - origin["allocated_mb"]) * KIB_A_MB for origin in (before, points[0]))
        cells = [f"{point['steps']:,}", f"{point['tokens']:,}", f"{point['resident_mb']:.1f}"]
        rows.append([*cells, f"{point['allocated_mb']:.1f}", *(f"{kib:,.0f}" for kib in growth)])
    headers = ["steps", "tokens a stream", "resident MB", "allocated MB", "KiB more", "KiB more since the warm-up"]
    return "\n".join([where(result["environment"]), "", table(headers, rows, texts=())])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=100_000, help="steps that share a line")
    parser.add_argument("--prompt-every", type=int, default=1_000, help="steps between two prompts")
    parser.add_argument("--warm-up", type=int, default=10_000, help="steps that do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.every, arguments.prompt_every, arguments.warm_up, arguments.threads) <= 0:
        parser.error("every number must be positive")
    if arguments.warm_up > arguments.steps:
        parser.error("--warm-up must be at most --steps")
    check_json(arguments.json)
    result = {"environment": environment(arguments.threads), "bundle": arguments.bundle.name}
    with Session.load(arguments.bundle, backend="ort", threads=arguments.threads) as session:
        result["points"] = run(session, arguments.steps, arguments.every, arguments.prompt_every, arguments.warm_up)
    print(show(result))
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
