"""Regular expressions of tokenizers: the C++ engine against Oniguruma, which the library 'tokenizers' uses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.cpp.probe import Probe, ProbeError
from tests.cpp.tokenizer_kinds import bytewise, load, metaspace, sequence, split

PATTERNS = (
    r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    r"(?:é\p{M}){2,}|(?:ab)+a?",
    r"a$|[^\n]+|\n+",
    r"\s{8}(?!\S)|\s{1,2}(?!\S)|\s",
    r"[^\P{L}a-z]+|[^\p{N}\p{P}\p{S}\p{Z}\p{C}A-Z]+",
    r"<x:[0-9]+>|[\t\n]|    |  ",
    r"x++x|x+y",
    r"\s+$|[a-z]+$",
    r"(?i:'[sdmt]|'ll|k)",
    r"[\[\]\-^a-c]+|[]x]|[a-]",
    r"(?:a|ab)(?:c|bcd)(?:d?)",
    r"\$|[.$]\d",
    r"(?:(?:1|2){1,3}3?){2}",
    r"(?:a?){3}b|(?:c?|d)y",
    r"(?:(?:x?y?){1,2}){0,2}1",
    r"(?=ab)a|b(?!a)",
    r"[^(\s|[.,!?…])]+",
    r"\p{^L}+\p{Lu}",
)
PIECES = (
    "a",
    "b",
    "ab",
    "abc",
    "bcd",
    "x",
    "xx",
    "y",
    "1",
    "12",
    "1234567",
    "é\u0301",
    "A",
    "Kk",
    "\u212a",
    " ",
    "  ",
    "\n",
    "\t",
    "'s",
    "'LL",
    "$",
    ".$1",
    "[]",
    "-",
    "^",
    "<x:1>",
    "日",
    "٣",
    "٣٣٣",
    "z" * 9,
    " " * 9,
    "\u0301",
)
ATOMS = (
    "a",
    "b",
    "c",
    "x",
    " ",
    "\\n",
    "1",
    "a",
    "b",
    "[ab]",
    "[^a]",
    r"\s",
    r"\S",
    r"\w",
    r"\d",
    "[a-c1]",
    r"[^\s\d]",
    r"\p{L}",
    r"\P{N}",
    "[[ab]1]",
    ".",
)
QUANTIFIERS = ("", "", "", "+", "*", "?", "{2}", "{1,2}", "{0,3}", "++")


def draw_pattern(draw: random.Random, depth: int) -> str:
    """Alternatives of a few items, groups and lookahead in each other."""

    def item() -> str:
        kind = draw.random() if depth else 0
        if kind > 0.85:
            return draw.choice(("(?=", "(?!")) + draw_pattern(draw, depth - 1) + ")"
        if kind > 0.8:
            return "$"
        if kind > 0.6:
            return "(?:" + draw_pattern(draw, depth - 1) + ")" + draw.choice(QUANTIFIERS[:-1])
        return draw.choice(ATOMS) + draw.choice(QUANTIFIERS)

    return "|".join("".join(item() for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(1, 3)))


def assert_same_matches(probe: Probe, path: Path, pattern: str, texts: list[str]) -> None:
    """Each match becomes a piece of its own, which the marks before pieces show."""
    splitter = sequence("pretokenizers", split(pattern, "Isolated"), metaspace(split=False))
    ours, library = load(probe, path, bytewise(pre_tokenizer=splitter))
    for text in texts:
        assert ours.encode(text) == library.encode(text).ids, (pattern, text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_where_patterns_match(probe: Probe, tmp_path: Path, pattern: str) -> None:
    draw = random.Random(9)
    texts = ["".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 20))) for _ in range(300)]
    assert_same_matches(probe, tmp_path / "tokenizer.json", pattern, texts)


def test_where_drawn_patterns_match(probe: Probe, tmp_path: Path) -> None:
    accepted = 0
    for seed in range(300):
        draw = random.Random(seed)
        pattern = draw_pattern(draw, 2)
        texts = ["".join(draw.choice("aabbccx  \n1é2") for _ in range(draw.randrange(1, 14))) for _ in range(30)]
        try:
            assert_same_matches(probe, tmp_path / "tokenizer.json", pattern, texts)
            accepted += 1
        except ProbeError as error:
            assert any(word in str(error) for word in ("nothing", "without end", "quantifier"))
        except Exception as error:
            if "Oniguruma" not in str(error):  # some are none to the library
                raise
    assert accepted > 100


def test_long_runs_take_no_stack(probe: Probe, tmp_path: Path) -> None:
    for pattern in (r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", r"(?:ab)+", r"\s+(?!\S)|\s+", "a++"):
        texts = ["1" * 600, "ab" * 5000, " " * 10000 + "a", "a" * 10000]
        assert_same_matches(probe, tmp_path / "tokenizer.json", pattern, texts)
