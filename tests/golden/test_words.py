"""Docstrings, messages, comments and docs keep to the field's words, which newcomers know from papers and libraries."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("exporter/sinkexport", "runtime", "plugins", "benchmarks", "tools", "tests")
"""Folders whose Python files, in C++ and CUDA ones the comments and messages, are held to the words."""
PROSE = ("README.md", "CONTRIBUTING.md", "docs", "recipes", "findings", "exporter", "runtime", "plugins", "benchmarks")
"""Markdown files that are, and folders with such files."""
SUFFIXES = {".py", ".c", ".cpp", ".h", ".cu", ".cuh"}
EXEMPT = ("third_party", "tests/golden")
"""Parts of paths: what others wrote, and this file with its words."""

WORDS = {
    r"told|tells?": "reported, shown",
    r"contenders?": "baseline, predictor",
    r"for ever(?!y)": "forever",
    r"favourites?": "top-1 agreement",
    r"mixtures? of experts(?!: )": "MoE",  # the glossary says what it is
    r"of which": "a sentence of its own",
    r"budgets?(?![:=])": "per-head window",  # ExportConfig has an argument `budgets`
    r"own windows?": "sliding window",
}
"""Pattern -> what to write instead."""
FORMER_NAMES = {"--budgets", "--budget-share", "sinkexport budgets", "budgets"}
"""Texts that users may have written down: options that still work, the format of a file, an argument's name."""
A_WORD = {"tell"}
"""Strings that are words and no prose: what a benchmark asks a server."""
BAD_START = re.compile(r"(Of|As|By|With)\b")
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(WORDS)), re.IGNORECASE)


def sources() -> list[Path]:
    found = {path for place in CODE for path in (ROOT / place).rglob("*") if path.suffix in SUFFIXES}
    for place in PROSE:
        path = ROOT / place
        found |= {path} if path.is_file() else set(path.rglob("*.md"))
    return sorted(path for path in found if not any(part in path.relative_to(ROOT).as_posix() for part in EXEMPT))


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


def wrong_words(line: int, text: str) -> Iterator[str]:
    if text not in FORMER_NAMES | A_WORD:
        for match in PATTERN.finditer(text):
            instead = list(WORDS.values())[int((match.lastgroup or "w0")[1:])]
            yield f"line {line}: '{match.group()}', better: {instead}"


def complaints(text: str) -> Iterator[str]:
    """What is wrong with the words of a Python file."""
    for line, words, is_docstring in texts(ast.parse(text)):
        yield from wrong_words(line, words)
        if is_docstring and BAD_START.match(words):
            yield f"line {line}: a docstring begins with '{words.split()[0]}', better: a verb or a noun"
    if PATTERN.search(text):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield from wrong_words(token.start[0], token.string)


def complaints_of(path: Path) -> list[str]:
    """What is wrong with the words of a file, names in C++ and code in Markdown included."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return list(complaints(text))
    lines = enumerate(text.splitlines(), 1) if PATTERN.search(text) else ()
    return [wrong for line, words in lines for wrong in wrong_words(line, words)]


def test_words() -> None:
    wrong = [f"{path.relative_to(ROOT)}, {found}" for path in sources() for found in complaints_of(path)]
    assert not wrong, "\n".join(wrong)


def test_all_kinds_of_files_are_read() -> None:
    assert {path.suffix for path in sources()} == {*SUFFIXES, ".md"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""Of a thing."""', 1),
        ('X = 1\n"""By the way."""', 1),
        ('def f():\n    """Offer a thing. It lasts forever."""\n    return f"kept for ever {1}"', 1),
        ('help = "As it is told, the mixture of experts"', 2),
        ('name, former = "--budgets", "budget"', 1),
        ("from x import budgets  # names are left alone", 0),
        ("x = 1  # what it was told", 1),
        ('"""Matter of fact; untold."""', 0),
    ],
)
def test_what_is_found(text: str, found: int) -> None:
    assert len(list(complaints(text))) == found
