"""Show what an export of a model would read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.text import Text
from sinkrt.errors import UsageError, problem

from sinkexport.analysis.model_report import RECURRENT, ModelReport, inspect_model
from sinkexport.util.console import counted, facts_table, listed, table_console

Facts = Mapping[str, Any]

WITHOUT_ATTENTION = {RECURRENT, "conv", "moe", "mlp"}
"""Kinds of layers that a configuration lists beside those with attention."""


def show_model(source: str, as_json: bool) -> None:
    """Print the report of a model."""
    report = inspect_model(source)
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    console = table_console()
    console.print(facts_table((name, _printable(value)) for name, value in _rows(report)))
    console.print()
    if not report.refused:
        console.print(Text("nothing that was read would be refused; 'export' probes the model itself as well"))
    for section, reason in report.refused:
        console.print(Text(f"refused ({section}): {_printable(reason)}"), soft_wrap=True)


def write_tokenizer_of(source: str, out: Path) -> None:
    """Write the tokenizer of a model into the folder `out`, as a bundle would hold it.

    Raises: UsageError if there is none, a bundle would not take it, or `out` has such files already.
    """
    report = inspect_model(source)
    tokenizer = report.tokenizer
    reason = next((reason for section, reason in report.refused if section == "tokenizer"), None)
    if reason is not None:
        raise UsageError(reason)
    if tokenizer is None:
        raise UsageError(
            problem(
                "--tokenizer-out",
                received="a model without a tokenizer",
                expected="one with",
                fix="use a complete model folder",
            )
        )
    there = [name for name in tokenizer.files if (out / name).exists()]
    if there:
        raise UsageError(
            problem(
                "--tokenizer-out",
                received=f"'{out}', which holds {', '.join(there)}",
                expected="a folder without them",
                fix="choose another folder",
            )
        )
    try:
        tokenizer.save(out)
    except OSError as error:
        raise UsageError(
            problem(
                "--tokenizer-out",
                received=f"'{out}' ({error.strerror or error})",
                expected="a folder that can be written",
                fix="choose another",
            )
        ) from error
    for remark in tokenizer.remarks:
        click.echo(f"note: {_printable(remark)}", err=True)
    click.echo(f"{out}: {', '.join(tokenizer.files)} ({tokenizer.num_tokens:,} tokens)")


def _rows(report: ModelReport) -> list[tuple[str, str]]:
    facts = report.facts
    return [
        ("model", f"{facts['name']} ({facts['format']})"),
        *_model(facts["model"], facts["windows"] or ()),
        *_tensors(facts["tensors"]),
        *_positions(facts["positions"]),
        *(
            (
                "windows",
                f"{counted(row['layers'], 'layer')}: {_words(row['kind'])}"
                + (f", {row['window']:,} tokens" if row["window"] else ""),
            )
            for row in facts["windows"] or ()
        ),
        *_tokenizer(facts["tokenizer"]),
        ("ends of a turn", _tokens(facts.get("ends") or ())),
        *(("note", remark) for remark in (facts["tokenizer"] or {}).get("remarks", ())),
    ]


def _words(kind: str) -> str:
    """Kind of layers in our words: transformers calls all recurrent ones linear attention."""
    if kind.startswith("hybrid"):
        return "sliding attention beside a recurrence" if "sliding" in kind else "full attention beside a recurrence"
    return RECURRENT if kind == "linear_attention" else kind.replace("_", " ")


def _layers(facts: Facts, rows: Sequence[Facts]) -> str:
    """Describe the layers' heads. rows: layers by kind."""
    kinds = {_words(row["kind"]) for row in rows}
    if kinds == {RECURRENT}:
        return f"{facts['num_layers']} x no attention"
    heads, others = _heads(facts), sum(row["layers"] for row in rows if _words(row["kind"]) in WITHOUT_ATTENTION)
    total = facts["num_layers"]
    return f"{total}: {total - others} x {heads}" if others else f"{total} x {heads}"


def _model(facts: Facts | None, rows: Sequence[Facts]) -> list[tuple[str, str]]:
    if facts is None:
        return []
    positions = f", trained for {facts['max_positions']:,} positions" if facts["max_positions"] else ""
    shared = facts.get("shared_layers")
    return [
        ("family", f"{facts['family']} ({facts['architecture'] or 'architecture not named'})"),
        (
            "layers",
            f"{_layers(facts, rows)}; hidden size {facts['hidden_size']}",
        ),
        *([] if shared is None else [("without a cache", f"the last {shared}: they read an earlier layer's")]),
        ("vocabulary", f"{facts['vocab_size']} tokens{positions}"),
    ]


def _heads(facts: Facts) -> str:
    sizes = [facts[name] for name in ("num_q_heads", "num_kv_heads", "head_dim")]
    if (latent := facts.get("latent")) is not None and sizes[0] is not None:
        return "{} query heads over latent rows of {} ({} of them values)".format(sizes[0], *latent)
    if None in sizes:
        return "heads as each layer has them, or none"
    return "{} query heads, {} key heads of {}".format(*sizes)


def _tensors(facts: Facts | None) -> list[tuple[str, str]]:
    if facts is None:
        return [("tensors", "not read")]
    types = ", ".join(
        f"{entry['count']} {name} ({entry['bytes'] / 1e6:.1f} MB)" for name, entry in sorted(facts["types"].items())
    )
    return [("tensors", f"{facts['count']}, {facts['bytes'] / 1e6:.1f} MB: {types}")]


def _positions(facts: Facts | None) -> list[tuple[str, str]]:
    if facts is None:
        return []
    rows = []
    for rope in facts["rope"]:
        scaling = ", ".join(f"{name} {_short(value)}" for name, value in rope["scaling"].items())
        rows.append(
            (
                "positions",
                f"rope, {rope['type']}, theta {rope['theta']}, share {rope['rotary_share']:.3g} of a "
                f"head, {rope['layers']}" + (f"; {scaling}" if scaling else ""),
            )
        )
    return rows or [("positions", facts["known_as"] or "not known")]


def _tokenizer(facts: Facts | None) -> list[tuple[str, str]]:
    if facts is None:
        return [("tokenizer", "none: token ids only, if nothing is refused below")]
    steps = " > ".join((*facts["normalizer"], *facts["pre_tokenizer"], facts["type"]))
    special = ", ".join(f"{name} {token['text']} ({token['id']})" for name, token in facts["special_tokens"].items())
    template = facts["chat_template"]
    return [
        (
            "tokenizer",
            f"{facts['read_from']}: {steps}; {facts['num_tokens']:,} tokens, {facts['num_added_tokens']} added",
        ),
        ("special tokens", special or "none with a name"),
        ("texts begin with", _tokens(facts["beginning"])),
        ("chat template", "none, or none that works" if template is None else _template(template)),
    ]


def _template(facts: Facts) -> str:
    history = "keeps earlier turns" if facts["keeps_history"] else "leaves earlier turns out"
    arguments = f"; reads {', '.join(facts['arguments'])}" if facts["arguments"] else ""
    return (
        f"{facts['characters']:,} characters; wants {facts['wants']}; system messages: "
        f"{facts['no_system_message'] or 'yes'}; {history}{arguments}"
    )


def _tokens(tokens: Any) -> str:
    return listed(f"{token['id']}" + (f" {token['text']}" if token["text"] else "") for token in tokens)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values of {min(value):g} to {max(value):g}" if value else "no values"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _printable(text: str) -> str:
    """Escape control characters, which a terminal would follow."""
    return "".join(sign if sign.isprintable() or sign == "\n" else f"\\x{ord(sign):02x}" for sign in text)
