"""Tokens/s with guessed tokens on the CPU, beside plain steps and beside llama.cpp with its n-gram speculation.

    python benchmarks/speculation_cpu.py BUNDLE --model MODEL.gguf [--tokens N] [--turns N] [--threads N] [--json FILE]

BUNDLE was exported with --speculate. All decode greedily, in this process, in turns (ours plain, ours guessing,
llama.cpp plain, llama.cpp guessing), so that whatever else the machine does hits all of them. Texts: those of
`sinkexport bench --speculate`. A turn is a whole answer without the prompt: of llama.cpp what its server reports as
the time of its predicted tokens.

llama.cpp is PyPI's xllamacpp, which runs MODEL as it is stored: compare each with its own plain steps. On a machine
that has other work, --threads 1 --processor-time shows what each costs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import check_json, table, write_json
from sinkexport.bench.machine import environment, physical_cores
from sinkexport.bench.speculation import answer_ids, prompt_ids
from sinkexport.bench.speculation_texts import FREE, TASKS
from sinkrt import Session
from sinkrt.speculate.tally import Tally

KINDS = ("plain", "guessing")


class LlamaCpp:
    """llama.cpp's server loop in this process, with and without guesses. kind: of its n-gram speculation."""

    def __init__(self, model: Path, threads: int, kind: str | None) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel = 1024, 1
        settings.fit_params, settings.verbosity = False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        if kind is not None:
            settings.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
        self._server = xllamacpp.Server(settings)

    def answer(self, ids: list[int], tokens: int, *, processor_time: bool) -> tuple[float, int, int]:
        """Milliseconds a token, and guessed and accepted tokens. The prompt but for its last token is kept."""
        greedy = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        request = {"prompt": ids, "n_predict": tokens, "cache_prompt": True, **greedy}
        begun = time.process_time()
        reply: dict[str, Any] = self._server.handle_completions(request)
        used, timings = (time.process_time() - begun) * 1e3 / tokens, reply["timings"]
        return (
            used if processor_time else timings["predicted_per_token_ms"],
            timings.get("draft_n", 0),
            timings.get("draft_n_accepted", 0),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, help="GGUF file for llama.cpp; without it, ours alone")
    parser.add_argument("--speculate", default="ngram")
    parser.add_argument("--kind", default="COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE", help="llama.cpp's n-gram speculation")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--processor-time", action="store_true", help="of the process, for a machine with other work")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    check_json(args.json)
    found = environment(args.threads)
    peers = {} if args.model is None else {"plain": None, "guessing": args.kind}
    rows, figures = [], []
    clock = time.process_time if args.processor_time else time.perf_counter
    with Session.load(args.bundle, threads=args.threads) as session:
        llamas = {kind: LlamaCpp(args.model, args.threads, type_) for kind, type_ in peers.items()}
        session.speculation(args.speculate)
        for name, (text, is_chat) in {**TASKS, **FREE}.items():
            ids = prompt_ids(session, text, is_chat=is_chat)
            session.reset()
            session.prefill(ids)
            start = session.copy_stream(0)
            times: dict[str, list[float]] = {}
            drafts = (0, 0)
            for llama in llamas.values():
                llama.answer(ids, 1, processor_time=False)  # reads the prompt
            answers = []
            for _ in range(args.turns):
                session.speculation(args.speculate).tally = Tally()
                for kind, speculate in zip(KINDS, (None, args.speculate), strict=True):
                    answer, ms = answer_ids(session, start, args.tokens, speculate, clock)
                    answers.append(answer)
                    times.setdefault(f"sinkexport {kind}", []).append(ms)
                for kind, llama in llamas.items():
                    ms, *drafts_now = llama.answer(ids, args.tokens, processor_time=args.processor_time)
                    times.setdefault(f"llama.cpp {kind}", []).append(ms)
                    drafts = (drafts_now[0], drafts_now[1])
            tally = session.speculation(args.speculate).tally
            speedups = {who: speedup(times, who) for who in ("sinkexport", "llama.cpp") if f"{who} plain" in times}
            figures.append(
                {
                    "text": name,
                    "is_task": name in TASKS,
                    "ms_per_token": times,
                    "speedup": speedups,
                    "tokens_per_step": tally.tokens_per_step,
                    "acceptance": tally.acceptance,
                    "llama_cpp_drafts": drafts,
                    "same": all(answer == answers[0] for answer in answers),
                }
            )
            rows.append(row_of(figures[-1]))
    print(table(["text", "tokens a step", "accepted", *times, *(f"{who} x" for who in speedups), "same"], rows))
    for who in speedups:
        means = [statistics.mean(f["speedup"][who] for f in figures if f["is_task"] == task) for task in (True, False)]
        print(f"{who}: {means[0]:.2f} times as fast on tasks, {means[1]:.2f} on free text")
    write_json(args.json, {"environment": found, "tokens": args.tokens, "texts": figures})


def speedup(times: dict[str, list[float]], who: str) -> float:
    """Median of the turns' ratios."""
    pairs = zip(*(times[f"{who} {kind}"] for kind in KINDS), strict=True)
    return statistics.median(plain / guessing for plain, guessing in pairs)


def row_of(figures: dict[str, Any]) -> list[str]:
    times = figures["ms_per_token"].values()
    return [
        figures["text"],
        f"{figures['tokens_per_step']:.2f}",
        f"{figures['acceptance']:.0%}",
        *(f"{statistics.median(ms):.2f} ({min(ms):.2f})" for ms in times),
        *(f"{one:.2f}" for one in figures["speedup"].values()),
        "yes" if figures["same"] else "no",
    ]


if __name__ == "__main__":
    sys.exit(main())
