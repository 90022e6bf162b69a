"""Odd texts on which a converted tokenizer is compared with the library that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sinkrt.errors import UsageError, problem

TEXTS: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \t\n ",
    "a",
    " a",
    "  a",
    "a ",
    "a  b",
    "\na",
    "a\n\n\nb",
    "Hello world",
    " Hello world",
    "Hello  World!",
    "Hello, y'all! How are you?",
    "don't can't WE'LL I'd they've O'Neill",
    "0",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    " 1 22 333 4444",
    "3.14159e-10",
    "2024-02-29T12:00:00Z",
    "\u00bd \u00b2",
    "camelCase snake_case kebab-case SCREAMING",
    "def f(x):\n    return x ** 2  # square\n",
    "\tif (a && b) { c[0]--; }",
    "https://example.org/a?b=c&d=%20#e",
    "name@example.org",
    "<s> is no token here >",
    "[INST] {{ x }} [/INST]",
    "\u00e9 e\u0301 \u212b \u1e9b\u0323",
    "stra\u00dfe \u0130stanbul \u01c5",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0967\u0968\u0969",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\U0001f600",
    "a\U0001f468\u200d\U0001f469\u200d\U0001f467b",
    "\U0001f1e9\U0001f1ea",
    "\u2581",
    "a\u2581b",
    "\u2581\u2581a",
    "a\u00a0b",
    "\u2003a\u3000b",
    "a\u200bb",
    "\ufeffa",
    "\u202eabc",
    "\x00\x01\x7f",
    "\U00020000\U0010fffd",
    "\ufffd",
    "''''\"\"\"\"",
    "!!!??? ...",
    "----====####",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ab ab ab  ab",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "x" * 200,
    " " * 65,
    "\n" * 17 + "end",
    "$1,234.56 + 7% = ?",
    "a/b\\c|d",
    "\u2014 dash \u2026 \u201cquotes\u201d \u2018single\u2019",
    "A.B.C. e.g. i.e.",
    "trailing space ",
    "trailing newline\n",
    " \n leading mix",
    "mixed\u65e5\u672cEnglish123\u6587\u5b57",
    "\u00c5ngstr\u00f6m na\u00efve fa\u00e7ade",
    "# # ## ### #a a# #version: 0.2",
)


def compare(
    ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]], texts: Iterable[str], what: str, original: str
) -> None:
    """Both must give the same ids for every text.

    Raises: UsageError with the first text for which they do not.
    """
    for text in texts:
        got, want = ours(text), theirs(text)
        if got != want:
            at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
            raise UsageError(
                problem(
                    what,
                    received=f"a conversion that gives {got[at : at + 4]} where {original} gives {want[at : at + 4]} "
                    f"(token {at} of {text[:40]!r})",
                    expected="the same ids",
                    fix="add the model's tokenizer.json to the folder",
                )
            )
