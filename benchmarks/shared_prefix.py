"""Time to the first token of clients that share a system message, with and without the store of prefixes.

    python benchmarks/shared_prefix.py BUNDLE [--system-tokens 900] [--turns 5] [--threads N] [--json FILE]

Starts ``sinkexport serve`` twice: as it is, and with ``--max-prefix-mib 0``. In each turn a new system message of that
many tokens is sent by two clients after each other, with different questions. The second one's time is shown beside the
first one's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import openai
from sinkexport.bench.machine import physical_cores
from sinkrt.contract import load_manifest
from sinkrt.text import Tokenizer
from soak_serve import served

QUESTIONS = ("What does the valve do now?", "Is anything out of the ordinary?")


def first_token_ms(client: openai.OpenAI, model: str, system: str, question: str) -> tuple[float, int]:
    """Milliseconds until the first token of an answer, and tokens of the prompt that were not fed."""
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    start = time.perf_counter()
    first, cached = None, 0
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    for part in stream:
        if first is None and part.choices and part.choices[0].delta.content:
            first = time.perf_counter() - start
        if part.usage is not None and part.usage.prompt_tokens_details is not None:
            cached = part.usage.prompt_tokens_details.cached_tokens or 0
    if first is None:
        raise RuntimeError("an answer without a token")
    return first * 1e3, cached


def system_messages(tokenizer: Tokenizer, tokens: int, count: int) -> list[str]:
    """Texts of about so many tokens that differ from the first word on."""
    words = [f"{chr(97 + i % 26)}{'aeiou'[i % 5]}r" for i in range(200)]
    random = np.random.default_rng(0)
    texts = []
    for number in range(count):
        text = f"{number}:"
        while len(tokenizer.encode(text)) < tokens:
            text += " " + " ".join(random.choice(words, 10))
        texts.append(text)
    return texts


def measured(bundle: Path, threads: int, systems: list[str], options: list[str]) -> list[dict[str, float]]:
    """Both clients' times for each system message."""
    rows = []
    with served(bundle, threads, 64, options) as (_, url):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        model = client.models.list().data[0].id
        for system in systems:
            first, _ = first_token_ms(client, model, system, QUESTIONS[0])
            second, cached = first_token_ms(client, model, system, QUESTIONS[1])
            rows.append({"first_ms": first, "second_ms": second, "cached_tokens": cached})
    return rows[1:]  # the first turn warms up


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--system-tokens", type=int, default=900)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    harness.check_json(arguments.json)
    facts = harness.environment(arguments.threads)
    manifest = load_manifest(arguments.bundle)
    tokenizer = Tokenizer.load(arguments.bundle, manifest)
    systems = system_messages(tokenizer, arguments.system_tokens, arguments.turns + 1)
    result: dict[str, Any] = {"environment": facts, "bundle": arguments.bundle.name}
    table = []
    for name, options in (("kept", []), ("not kept", ["--max-prefix-mib", "0"])):
        rows = measured(arguments.bundle, arguments.threads, systems, options)
        result[name] = rows
        first, second = (statistics.median(row[key] for row in rows) for key in ("first_ms", "second_ms"))
        ratios = statistics.median(row["second_ms"] / row["first_ms"] for row in rows)
        cached = statistics.median(row["cached_tokens"] for row in rows)
        table.append([name, f"{first:.0f}", f"{second:.0f}", f"{ratios:.2f}", f"{cached:.0f}"])
    print(harness.where(facts), "", sep="\n")
    headers = ["prefixes", "first client, ms", "second client, ms", "second / first", "tokens not fed"]
    print(harness.table(headers, table))
    harness.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
