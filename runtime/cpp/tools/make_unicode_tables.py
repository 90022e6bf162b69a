"""Write ``src/unicode_tables.inc``: what the C++ tokenizer knows of Unicode.

General categories and numeric characters are asked of the `tokenizers` library, so that they are those of the regular
expression engine and the standard library that it was built with; the rest is Python's.

    python runtime/cpp/tools/make_unicode_tables.py
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

TARGET = Path(__file__).parents[1] / "src/unicode_tables.inc"
SURROGATES = range(0xD800, 0xE000)
# In the order of the enumeration in unicode.h; what none of them matches is unassigned (Cn).
CATEGORIES = (
    "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po",
    "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn",
)  # fmt: skip
BLOCK = 1 << 14


def code_points() -> list[int]:
    return [code for code in range(0x110000) if code not in SURROGATES]


def matched(splitter: pre_tokenizers.PreTokenizer) -> list[int]:
    """The code points that a splitter removes."""
    found, codes = [], code_points()
    for start in range(0, len(codes), BLOCK):
        block = codes[start : start + BLOCK]
        end = 0
        for _, (first, last) in [*splitter.pre_tokenize_str("".join(map(chr, block))), ("", (len(block), 0))]:
            found += block[end:first]
            end = last
    return found


def numeric() -> list[int]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return [code for code in code_points() if len(digits.pre_tokenize_str("a" + chr(code))) == 2]


def runs(values: list[int]) -> list[tuple[int, int]]:
    """(first code point, value) wherever the value changes."""
    return [(i, value) for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def decompositions() -> list[tuple[int, int, int]]:
    """(code point, first, second or 0) of every canonical decomposition but those of Hangul, which are arithmetic."""
    found = []
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code))
        if parts and not parts.startswith("<"):
            first, second = ([int(part, 16) for part in parts.split()] + [0])[:2]
            found.append((code, first, second))
    return found


def table(name: str, kind: str, numbers: list[int], per_row: int, digits: int) -> str:
    cells = [f"0x{number:0{digits}x}," for number in numbers]
    rows = ["    " + " ".join(cells[i : i + per_row]) for i in range(0, len(cells), per_row)]
    return "\n".join([f"constexpr {kind} {name}[] = {{", *rows, "};\n"])


def main() -> None:
    categories = [CATEGORIES.index("Cn")] * 0x110000
    for index, category in enumerate(CATEGORIES[:-1]):
        for code in matched(pre_tokenizers.Split(Regex(rf"\p{{{category}}}+"), "removed")):
            categories[code] = index
    is_numeric = [0] * 0x110000
    for code in numeric():
        is_numeric[code] = 1
    classes = [unicodedata.combining(chr(code)) for code in range(0x110000)]
    pairs = decompositions()
    composed = sorted(
        (first, second, code)
        for code, first, second in pairs
        if second and unicodedata.normalize("NFC", chr(code)) == chr(code)
    )
    parts = [
        "// Made by tools/make_unicode_tables.py.\n",
        "// First code point << 5 | category, wherever the category changes.",
        table("kCategories", "uint32_t", [code << 5 | value for code, value in runs(categories)], 10, 8),
        "// Code points where a run of numeric characters begins or ends, in turn.",
        table("kNumeric", "uint32_t", [code for code, _ in runs(is_numeric)][1:], 10, 5),
        "// First code point << 8 | canonical combining class, wherever the class changes.",
        table("kCombining", "uint32_t", [code << 8 | value for code, value in runs(classes)], 10, 8),
        "// Code point, first and second part (0: none) of a canonical decomposition.",
        table("kDecompositions", "uint32_t", [part for triple in pairs for part in triple], 12, 5),
        "// First part, second part, code point of what NFC composes.",
        table("kCompositions", "uint32_t", [part for triple in composed for part in triple], 12, 5),
    ]
    TARGET.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
