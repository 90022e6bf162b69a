"""Write ``src/text/unicode_tables.inc`` and ``src/text/grapheme_tables.inc``: what the C++ tokenizer knows of Unicode.

Everything is asked of the `tokenizers` library, part by part: its regular expression engine, its standard library, its
normalization and its case tables are of different versions of Unicode. Python's tables only say where to look. What
belongs to one character on the screen it does not say: that is Unicode 17's, of the package `regex` of that time.

    python runtime/cpp/tools/make_unicode_tables.py  # with regex==2025.11.3
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import regex
from tokenizers import Regex, normalizers, pre_tokenizers

TARGET = Path(__file__).parents[1] / "src/text/unicode_tables.inc"
GRAPHEMES = TARGET.with_name("grapheme_tables.inc")
SURROGATES = range(0xD800, 0xE000)
# In the order of the enumeration in unicode.h; what none of them matches is unassigned (Cn).
CATEGORIES = (
    "Lu",
    "Ll",
    "Lt",
    "Lm",
    "Lo",
    "Mn",
    "Mc",
    "Me",
    "Nd",
    "Nl",
    "No",
    "Pc",
    "Pd",
    "Ps",
    "Pe",
    "Pi",
    "Pf",
    "Po",
    "Sm",
    "Sc",
    "Sk",
    "So",
    "Zs",
    "Zl",
    "Zp",
    "Cc",
    "Cf",
    "Co",
    "Cn",
)
BLOCK = 1 << 14
# In the order of the enumeration in grapheme.cpp, from 1 on; a character is of the last that matches.
GRAPHEME_BREAKS = (
    "GCB=CR",
    "GCB=LF",
    "GCB=Control",
    "GCB=Extend",
    "GCB=ZWJ",
    "GCB=SpacingMark",
    "GCB=Prepend",
    "GCB=L",
    "GCB=V",
    "GCB=T",
    "GCB=Regional_Indicator",
    "Extended_Pictographic",
    "InCB=Consonant",
)
INCB_EXTEND, INCB_LINKER = 1 << 4, 1 << 5


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


def split_off(splitter: pre_tokenizers.PreTokenizer) -> list[int]:
    """1 for each code point that a splitter takes off a letter before it."""
    found = [0] * 0x110000
    for code in code_points():
        found[code] = int(len(splitter.pre_tokenize_str("a" + chr(code))) == 2)
    return found


def grapheme_breaks() -> list[int]:
    """How each code point joins others, Hangul's syllables left out: a break property and flags for conjuncts.

    Raises: SystemExit if the tables of `regex` are not Unicode 17's.
    """
    if regex.match(r"\p{GCB=Extend}", "\u05c8") or not regex.match(r"\p{GCB=Extend}", "\u1acf"):
        raise SystemExit("the package regex is not of Unicode 17: pip install regex==2025.11.3")
    properties = [(regex.compile(rf"\p{{{name}}}"), i) for i, name in enumerate(GRAPHEME_BREAKS, 1)]
    flags = ((regex.compile(r"\p{InCB=Extend}"), INCB_EXTEND), (regex.compile(r"\p{InCB=Linker}"), INCB_LINKER))
    found = [0] * 0x110000
    for code in code_points():
        character = chr(code)
        if not is_syllable(code):
            found[code] = max((i for pattern, i in properties if pattern.match(character)), default=0)
            found[code] |= sum(flag for pattern, flag in flags if pattern.match(character))
    return found


def runs(values: list[int]) -> list[tuple[int, int]]:
    """(first code point, value) wherever the value changes."""
    return [(i, value) for i, value in enumerate(values) if i == 0 or value != values[i - 1]]


def is_syllable(code: int) -> bool:
    """Hangul syllables, whose decomposition is arithmetic."""
    return 0xAC00 <= code < 0xD7A4


def changed(normalizer: normalizers.Normalizer) -> dict[int, str]:
    """What becomes of each single code point that a normalizer changes."""
    texts = {code: normalizer.normalize_str(chr(code)) for code in code_points() if not is_syllable(code)}
    return {code: text for code, text in texts.items() if text != chr(code)}


def combining_classes() -> list[int]:
    """Canonical combining classes as the library sorts by them.

    A character stands behind one of a lower class, however they come: so one of each class measures the others.
    """
    sort = normalizers.NFD().normalize_str
    highest = "\N{COMBINING GREEK YPOGEGRAMMENI}"
    samples: dict[int, str] = {unicodedata.combining(highest): highest}
    for character in map(chr, code_points()):
        if sort(highest + character) == character + highest != highest + character:  # the library knows it
            samples.setdefault(unicodedata.combining(character), character)
    order = sorted(samples)
    first, last = samples[order[0]], samples[order[-1]]

    def above(character: str, sample: str) -> bool:
        """Whether the class of a character is above a sample's."""
        return sort(character + sample) == sample + character and character != sample

    found = [0] * 0x110000
    for code in code_points():
        character = chr(code)
        if is_syllable(code) or sort(character) != character:
            continue
        if not (above(character, first) or sort(last + character) == character + last or character in (first, last)):
            continue
        found[code] = max((cls for cls in order if above(character, samples[cls])), default=0)
        found[code] = next((cls for cls in order if cls > found[code]), order[-1])
        if character == last:
            found[code] = order[-1]
    return found


def compositions(canonical: dict[int, str]) -> list[tuple[int, int, int]]:
    """(first, second, what the library composes of them)."""
    compose = normalizers.NFC().normalize_str
    found = []
    for code in canonical:
        parts = unicodedata.decomposition(chr(code))
        if parts.startswith("<") or " " not in parts:
            continue
        first, second = (int(part, 16) for part in parts.split())
        if compose(chr(first) + chr(second)) == chr(code):
            found.append((first, second, code))
    return sorted(found)


def mapping(name: str, texts: dict[int, str]) -> str:
    """Two tables: code point << 5 | length, in order; and all that they become, one after the other."""
    keys = [code << 5 | len(text) for code, text in sorted(texts.items())]
    values = [ord(character) for _, text in sorted(texts.items()) for character in text]
    return table(f"{name}Keys", "uint32_t", keys, 10, 8) + table(f"{name}Values", "uint32_t", values, 12, 5)


def edges(flags: list[int]) -> list[int]:
    """Code points where a run of marked ones begins or ends, in turn."""
    return [code for code, _ in runs(flags)][1:]


def table(name: str, kind: str, numbers: list[int], per_row: int, digits: int) -> str:
    cells = [f"0x{number:0{digits}x}," for number in numbers]
    rows = ["    " + " ".join(cells[i : i + per_row]) for i in range(0, len(cells), per_row)]
    return "\n".join([f"constexpr {kind} {name}[] = {{", *rows, "};\n"])


def main() -> None:
    categories = [CATEGORIES.index("Cn")] * 0x110000
    for index, category in enumerate(CATEGORIES[:-1]):
        for code in matched(pre_tokenizers.Split(Regex(rf"\p{{{category}}}+"), "removed")):
            categories[code] = index
    words = [0] * 0x110000
    for code in matched(pre_tokenizers.Split(Regex(r"[\w]+"), "removed")):
        words[code] = 1
    marks = [0] * 0x110000
    for code in changed(normalizers.StripAccents()):
        marks[code] = 1
    canonical, compatible = changed(normalizers.NFD()), changed(normalizers.NFKD())
    edge_tables: tuple[tuple[str, str, Callable[[], list[int]]], ...] = (
        ("kNumeric", "numeric characters", lambda: split_off(pre_tokenizers.Digits(individual_digits=True))),
        ("kPunctuation", "punctuation", lambda: split_off(pre_tokenizers.Punctuation("isolated"))),
        ("kWord", "\\w in a class", lambda: words),
        ("kMark", "combining marks", lambda: marks),
    )
    parts = [
        "// Made by tools/make_unicode_tables.py.\n",
        "// First code point << 5 | category, wherever the category changes.",
        table("kCategories", "uint32_t", [code << 5 | value for code, value in runs(categories)], 10, 8),
        "// First code point << 8 | canonical combining class, wherever the class changes.",
        table("kCombining", "uint32_t", [code << 8 | value for code, value in runs(combining_classes())], 10, 8),
        "// First part, second part, code point of what NFC composes.",
        table("kCompositions", "uint32_t", [part for triple in compositions(canonical) for part in triple], 12, 5),
        "// Code point << 5 | length, and all that these become: canonical and compatible decomposition, lower case.",
        mapping("kCanonical", canonical),
        mapping("kCompatible", compatible),
        mapping("kLower", changed(normalizers.Lowercase())),
    ]
    for name, meaning, flags in edge_tables:
        parts.append(f"// Code points where a run of {meaning} begins or ends, in turn.")
        parts.append(table(name, "uint32_t", edges(flags()), 10, 5))
    TARGET.write_text("\n".join(parts), encoding="utf-8")
    parts = [
        "// Made by tools/make_unicode_tables.py.\n",
        "// First code point << 6 | how it joins others (grapheme.cpp), wherever that changes.",
        table("kGraphemes", "uint32_t", [code << 6 | value for code, value in runs(grapheme_breaks())], 10, 8),
    ]
    GRAPHEMES.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
