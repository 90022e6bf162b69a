"""Docstrings, messages and help texts keep to the field's words: a newcomer knows them from papers and libraries."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DONE = ("exporter/sinkexport",)
"""Files and folders that are held to the words. runtime/sinkrt belongs here in the end."""

LATER = ("exporter/sinkexport/bench/step_bytes.py",)
"""Files that wait for a change elsewhere."""

WORDS = {
    r"told|tells?": "reported, shown",
    r"contenders?": "baseline, predictor",
    r"for ever": "forever",
    r"same favourite": "top-1 agreement",
    r"mixtures? of experts": "MoE",
    r"of which": "a sentence of its own",
    r"budgets?(?!:)": "per-head window",  # ExportConfig documents its argument `budgets`
    r"own windows?": "sliding window",
}
"""Pattern -> what to write instead."""
FORMER_NAMES = {"--budgets", "--budget-share", "sinkexport budgets"}
"""Texts that users may have written down: options that still work, and the format of a file."""
BAD_START = re.compile(r"(Of|As|By|With)\b")
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(WORDS)), re.IGNORECASE)


def sources() -> list[Path]:
    files = {path for place in DONE for path in (ROOT / place, *(ROOT / place).rglob("*.py")) if path.is_file()}
    return sorted(files - {ROOT / name for name in LATER})


def texts(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a docstring) of every string; docstrings of constants count as such."""
    docstrings = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in node.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, id(node) in docstrings


def complaints(text: str) -> Iterator[str]:
    """What is wrong with the words of a Python file."""
    for line, words, is_docstring in texts(ast.parse(text)):
        if words not in FORMER_NAMES:
            for match in PATTERN.finditer(words):
                instead = list(WORDS.values())[int((match.lastgroup or "w0")[1:])]
                yield f"line {line}: '{match.group()}', better: {instead}"
        if is_docstring and BAD_START.match(words):
            yield f"line {line}: a docstring begins with '{words.split()[0]}', better: a verb or a noun"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path: Path) -> None:
    assert list(complaints(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""Of a thing."""', 1),
        ('X = 1\n"""By the way."""', 1),
        ('def f():\n    """Offer a thing. It lasts forever."""\n    return f"kept for ever {1}"', 1),
        ('help = "As it is told, the mixture of experts"', 2),
        ('name, former = "--budgets", "budget"', 1),
        ("from x import budgets  # names and comments are left alone", 0),
        ('"""Matter of fact; untold."""', 0),
    ],
)
def test_what_is_found(text: str, found: int) -> None:
    assert len(list(complaints(text))) == found
