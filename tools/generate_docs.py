"""Write the generated parts of the docs anew: commands, families, manifest fields, recipes, layers.

    python tools/generate_docs.py [--check]

A generated part of a Markdown file stands between ``<!-- generated: NAME -->`` and ``<!-- end of NAME -->``. `--check`
writes nothing, and ends with 1 if a part is not what it should be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from sinkexport import families
from sinkexport.cli import cli
from sinkexport.quant.recipe import load_recipe, recipe_names
from sinkrt import contract

ROOT = Path(__file__).parents[1]
HELP_WIDTH = 100


def commands() -> str:
    """Every command's help, as ``--help`` prints it."""
    parts = []
    width: dict[str, Any] = {"terminal_width": HELP_WIDTH, "max_content_width": HELP_WIDTH}
    context = click.Context(cli, info_name="sinkexport", **width, **cli.context_settings)
    parts.append(f"```text\n{cli.get_help(context)}\n```\n")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        inner = click.Context(command, context, info_name=name, **width)
        parts.append(f"## {name}\n\n```text\n{command.get_help(inner)}\n```\n")
    return "\n".join(parts)


def family_table() -> str:
    """All families, exported and refused."""
    return families.markdown_table()


def all_families() -> str:
    """What became of every causal LM class of transformers, as tests/families/found.json records it."""
    found = json.loads((ROOT / "tests/families/found.json").read_text(encoding="utf-8"))
    by_state: dict[str, dict[str, list[str]]] = {}
    for family, (state, reason) in found["families"].items():
        by_state.setdefault(state, {}).setdefault(_reason(reason, family), []).append(f"`{family}`")
    parts = [f"Of the {len(found['families'])} families of transformers {found['transformers']}:"]
    for state, reasons in sorted(by_state.items()):
        names = [name for same in reasons.values() for name in same]
        if list(reasons) == [""]:
            parts.append(f"**{state}: {len(names)}.** {', '.join(names)}")
            continue
        rows: list[Sequence[str]] = [("families", "reason"), ("---",) * 2]
        rows += [(", ".join(same), reason) for reason, same in sorted(reasons.items(), key=lambda item: item[1])]
        parts.append(f"**{state}: {len(names)}.**\n\n{_table(rows)}".rstrip())
    return "\n\n".join(parts)


def _reason(text: str, family: str) -> str:
    """A refusal as the table shows it: without names of families and classes, so that equal ones share a row."""
    named = re.sub(
        r"\b(?:an? )?\w+(?:ForCausalLM|ForConditionalGeneration|LMHead\w*|Decoder|TextConfig)(?=,)", "a class", text
    )
    return (
        re.sub(rf" '{family}'|(?<=received ){family}(?=,)", "", named)
        .replace("received ,", "received a model,")
        .replace("<", "\\<")
    )


def manifest() -> str:
    """A table of fields for each class of the manifest, the whole first, the others in order of appearance."""
    seen: list[type] = []

    def visit(cls: type) -> None:
        if cls in seen:
            return
        seen.append(cls)
        for hint in typing.get_type_hints(cls).values():
            for part in _parts(hint):
                if dataclasses.is_dataclass(part):
                    visit(typing.cast(type, part))

    visit(contract.Manifest)
    return "\n".join(_class_section(cls) for cls in seen)


def recipes() -> str:
    """The recipes that come with the package."""
    rows = [("recipe", "weights", "inputs of matmuls", "window", "targets", "what it is"), ("---",) * 6]
    for name in recipe_names():
        recipe = load_recipe(name)
        floats = "bfloat16" if recipe.floats == "bfloat16" else "floating point"
        weights = f"INT{recipe.weights.bits}, {_scales(recipe.weights)}" if recipe.weights else floats
        weights = "as stored" if recipe.stored == "keep" else weights
        mode = recipe.activations.mode if recipe.activations else "float"
        inputs = {
            "float": "floating point",
            "dynamic": "INT8, ranges found at run time",
            "static": "INT8, ranges from calibration",
        }[mode]
        window = "INT8" if recipe.kv == "int8" else "floating point"
        rows.append((f"`{name}`", weights, inputs, window, ", ".join(recipe.targets), recipe.description))
    return _table(rows)


def layers() -> str:
    """The order of imports, as import-linter checks it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    blocks = []
    for contract_facts in contracts:
        if contract_facts["type"] == "layers":
            lines = [re.sub(r"\bsinkexport\.|[()]", "", line) for line in contract_facts["layers"]]
            blocks.append(f"{contract_facts['name']}:\n\n```text\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(blocks)


PARTS: Mapping[str, tuple[str, Callable[[], str]]] = {
    "layers": ("docs/architecture.md", layers),
    "commands": ("docs/cli.md", commands),
    "families": ("docs/families.md", family_table),
    "all families": ("docs/families.md", all_families),
    "manifest": ("docs/manifest.md", manifest),
    "recipes": ("recipes/README.md", recipes),
}


def updated(text: str, name: str, part: str) -> str:
    """`text` with its generated part `name` replaced.

    Raises: SystemExit if the file has no such part.
    """
    begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"no '{begin}' .. '{end}' in its file")
    return f"{before}{begin}\n\n{part.strip()}\n\n{end}{after}"


def _scales(weights: Any) -> str:
    shared = f"blocks of {weights.block_size}" if weights.granularity == "block" else "a scale for each output"
    return shared + (", rounded for their inputs" if weights.rounding == "gptq" else "")


def _class_section(cls: type) -> str:
    rows = [("field", "type", "meaning"), ("---",) * 3]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        rule = field.metadata.get("rule")
        meaning = getattr(rule, "doc", "") if rule is not None else ""
        if choices := getattr(rule, "one_of", ()):
            meaning += ": " + ", ".join(f"`{choice}`" for choice in choices)
        optional = field.default is not dataclasses.MISSING
        rows.append((f"`{field.name}`", _type(hints[field.name]) + (", may be absent" if optional else ""), meaning))
    text = re.sub(r"``([^`]+)``", r"`\1`", " ".join((cls.__doc__ or "").split()))
    return f"## {cls.__name__}\n\n{text}\n\n{_table(rows)}"


def _parts(hint: Any) -> list[Any]:
    arguments = typing.get_args(hint)
    return [hint] if not arguments else [part for argument in arguments for part in _parts(argument)]


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if argument is type(None) else _type(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is not None:
        return f"object of {_type(arguments[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return names.get(hint) or f"[{hint.__name__}](#{hint.__name__.lower()})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def main() -> None:
    """Write or check every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a part is stale")
    arguments = parser.parse_args()
    stale = []
    for name, (file, make) in PARTS.items():
        path = ROOT / file
        text = path.read_text(encoding="utf-8")
        new = updated(text, name, make())
        if new != text:
            stale.append(file)
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    if stale and arguments.check:
        sys.exit(f"not as generated: {', '.join(stale)}; run 'make generated'")


if __name__ == "__main__":
    main()
