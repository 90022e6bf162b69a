"""Answers that match a JSON schema: how many do, and what following it costs of a decode step.

    python benchmarks/structured_output.py BUNDLE [--generations 1000] [--rounds 12] [--tokens 64] [--threads N]
                                           [--seed N] [--json FILE]

Generations go through `Session.generate` at a temperature of 1.5 with schemas of all kinds in turn; a model of random
weights says nothing that would help. jsonschema judges what comes out. Answers that reach the limit of tokens are
counted apart: they are parts of JSON texts.

The cost is measured in turns: `--tokens` tokens of free text, then as many under a schema without end, and so on, in
one session, greedy. Medians over the tokens of all rounds are compared, and so are the least of the rounds' medians.
Free text and JSON have other tokens, whose steps cost the same. The processor time of all threads says the same on a
machine that others load, with `--threads 1`; there the mask's thread counts in full, though it runs beside the step.
How long masks take by themselves is timed apart.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from harness import check_json, environment, table, where, write_json
from sinkexport.bench.machine import physical_cores
from sinkrt import Session
from sinkrt.grammar import Grammar

MOST_TOKENS = 600
TEMPERATURE = 1.5
PROMPT = "Write down what you know about a person, as JSON.\n"
ENDLESS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "minItems": 10_000,
}
TEXT = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": TEXT,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "emails": {
                "type": "array",
                "items": {"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}$"},
                "maxItems": 2,
            },
            "address": {"$ref": "#/$defs/address"},
        },
        "required": ["name", "age", "address"],
        "additionalProperties": False,
        "$defs": {
            "address": {
                "type": "object",
                "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "kind": {"enum": ["home", "work"]}},
                "required": ["zip"],
                "additionalProperties": False,
            }
        },
    },
    "choice": {"anyOf": [{"const": {"a": [1, None]}}, {"type": ["boolean", "null"]}, {"enum": ["x", 2.5, "\u00e9"]}]},
    "numbers": {
        "type": "array",
        "items": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 1000},
        "minItems": 1,
        "maxItems": 4,
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "merged": {
        "allOf": [
            {"type": "object", "properties": {"id": {"type": "integer", "minimum": 1}}, "required": ["id"]},
            {"properties": {"id": {"maximum": 99}, "on": {"type": "string", "format": "ipv4"}}, "required": ["on"]},
        ],
        "additionalProperties": False,
        "properties": {"id": {}, "on": {}},
    },
    "map": {
        "type": "object",
        "patternProperties": {"^k[0-9]{1,2}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 3,
    },
}


def generations(session: Session, count: int, seed: int) -> dict[str, collections.Counter[str]]:
    """How many answers to each schema are valid, wrong, or cut."""
    found: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in SCHEMAS}
    names = list(SCHEMAS)
    for i in range(count):
        name = names[i % len(names)]
        schema = SCHEMAS[name]
        session.reset()
        pieces = session.generate(
            PROMPT, json_schema=schema, max_tokens=MOST_TOKENS, temperature=TEMPERATURE, seed=seed + i
        )
        begun = int(session.position[0])
        text = "".join(pieces)
        if int(session.position[0]) - begun >= MOST_TOKENS:
            found[name]["cut"] += 1
            continue
        try:
            judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
            judge.validate(json.loads(text))
            found[name]["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            found[name]["wrong"] += 1
            print(f"wrong: {name}: {text!r}: {str(error).splitlines()[0]}")
    return found


def timed(pieces: Iterator[str], session: Session) -> list[float]:
    """Milliseconds of each token of an answer. A piece may be several tokens: they share its time."""
    times: list[float] = []
    position, start = int(session.position[0]), time.perf_counter()
    for _ in pieces:
        now, at = time.perf_counter(), int(session.position[0])
        times += [(now - start) * 1e3 / max(1, at - position)] * (at - position)
        position, start = at, time.perf_counter()
    return times


def overhead(session: Session, rounds: int, tokens: int) -> dict[str, float]:
    """Medians of the milliseconds of a token: free, and under a schema, in turns."""
    session.grammars.compile(Grammar.of_schema(ENDLESS))
    kinds: dict[str, dict[str, Any]] = {"free": {"ignore_eos": True}, "schema": {"json_schema": ENDLESS}}
    times: dict[str, list[list[float]]] = {name: [] for name in kinds}
    cpu: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, options in kinds.items():
            session.reset()
            pieces = session.generate(PROMPT, max_tokens=tokens, **options)
            start = time.process_time()
            times[name].append(timed(pieces, session)[1:])
            cpu[name].append((time.process_time() - start) * 1e3 / tokens)
    result = {}
    for name, all_rounds in times.items():
        warm = all_rounds[1:]
        result[f"{name}_median_ms"] = float(np.median(np.concatenate(warm)))
        result[f"{name}_least_ms"] = float(min(np.median(one) for one in warm))
        result[f"{name}_cpu_ms"] = float(np.median(cpu[name][1:]))
    return result


def masks(session: Session, count: int, seed: int) -> dict[str, float]:
    """Microseconds of a mask in its own thread, for random tokens under a schema, and milliseconds of its build."""
    start = time.perf_counter()
    session.grammars.compile(Grammar.of_schema({**ENDLESS, "description": "built anew"}))
    build_ms = (time.perf_counter() - start) * 1e3
    compiled = session.grammars.compile(Grammar.of_schema(ENDLESS))
    chance, times = np.random.default_rng(seed), []
    matcher = compiled.matcher([])
    for _ in range(count):
        allowed = matcher.allowed()
        if allowed is None:
            break
        token = int(chance.choice(np.flatnonzero(allowed.mask)))
        start = time.perf_counter()
        matcher.take(token)
        matcher.allowed()
        times.append((time.perf_counter() - start) * 1e6)
    return {"build_ms": build_ms, "median_us": float(np.median(times)), "p99_us": float(np.percentile(times, 99))}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_json(options.json)
    facts: dict[str, Any] = {"environment": environment(options.threads), "bundle": options.bundle.name}
    with Session.load(options.bundle, threads=options.threads) as session:
        if options.rounds:
            facts["step"] = overhead(session, options.rounds, options.tokens)
            facts["mask"] = masks(session, 2000, options.seed)
        found = generations(session, options.generations, options.seed)
    facts["generations"] = {name: dict(counts) for name, counts in found.items()}
    print(where(facts["environment"]))
    rows = [[name, *(str(counts[kind]) for kind in ("valid", "wrong", "cut"))] for name, counts in found.items()]
    rows.append(["all", *(str(sum(int(row[i]) for row in rows)) for i in (1, 2, 3))])
    print(table(["schema", "valid", "wrong", "cut"], rows))
    if options.rounds:
        step, mask = facts["step"], facts["mask"]
        share = step["schema_median_ms"] / step["free_median_ms"] - 1
        cpu = step["schema_cpu_ms"] / step["free_cpu_ms"] - 1
        least = step["schema_least_ms"] / step["free_least_ms"] - 1
        print(
            f"a token: {step['free_median_ms']:.3f} ms free, {step['schema_median_ms']:.3f} ms under a schema "
            f"({share:+.1%}; least {least:+.1%}; processor time {step['free_cpu_ms']:.3f} ms and "
            f"{step['schema_cpu_ms']:.3f} ms, {cpu:+.1%}); a mask by itself: median {mask['median_us']:.0f} us, "
            f"p99 {mask['p99_us']:.0f} us; a build {mask['build_ms']:.1f} ms"
        )
    write_json(options.json, facts)


if __name__ == "__main__":
    main()
