"""Texts that are hard to tokenize: scripts, digits, white space, contractions, signs, control characters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

POOLS = (
    "abcXYZéÉßñ",
    "0123456789",
    "   \t\n\r",
    ".,!?'\"()[]{}-_/\\$%&*+<=>^~|`#@;:",
    "中文字漢語。、「」ーあア한국어",
    "абвАБВ",
    "àéîõü\u0301\u0308\u200d\u200c\ufe0f",
    "😀👍🏽🇩🇪🧑\u200d💻",
    "٠١٢३४½²Ⅷ",
    "\u00a0\u2003\u3000\u2028\x85\x0b\x0c",
    "مرحبا שלום नमस्ते ไทย",
    "\x00\x01\x04\x06\x13\x1f\x7f\u0378",
)
WORDS = (
    "'s",
    "'t",
    "'re",
    "'VE",
    "'m",
    "'LL",
    "'d",
    "'\u017f",
    "I'm",
    " don't",
    " 2024",
    " 3.14",
    "1234567",
    "  12",
    "Hello",
    "World",
    " the",
    "\n\n",
    "\n \n",
    "   \n",
    "\r\n",
    "  ",
    "    ",
    "http://a.b/c?d=1",
    "CamelCaseWord",
    "camelCase",
    "ÉCOLEécole",
    "ПРИВЕТмир",
    "<sentinel:12>",
    "IMGIMGABCZ",
    "你好世界",
    "1,000,000",
    "x=1;",
    "\t\tif",
    "a  b",
    "a\n",
    "<0x0A>",
    "▁",
    "▁▁",
    "<s>",
    "</s>",
    "<|im_end|>",
    "\n1. ",
    " _a/b/\n",
)
CLASSES = (
    "aAzZsSlLdDtTmrevREVﬁÉéßſКабБ中文一龥가힣ㄱあアーﾊก១၀أאع123٣५½²Ⅷ  \t\n\r\x0b\x85\u3000\u2003\xa0\u2028\u1680"
    ".,'’!?/-_[]()\\^`~$+<=>|%#@\"&*:;{}€©。、，「」！…‘️😀🏽\u0301\u0947\u20e3\u200d\u200c\x00\x04\x7f\u0378\ufa6e𠀀𪜀𮯠𰀀𐐀𐲀𑢠𞤀￼\ue000"
)
"""One or more characters of each class that a pattern may distinguish."""


def texts(count: int, seed: int, special: Sequence[str] = ("<s>",)) -> Iterator[str]:
    """Texts of words, runs of one kind of character, and special tokens."""
    source = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(source.randint(1, 12)):
            choice = source.random()
            pool = source.choice(POOLS)
            if choice < 0.45:
                parts += [source.choice(source.choice(POOLS)) for _ in range(source.randint(1, 4))]
            elif choice < 0.65:
                parts += [source.choice(pool) for _ in range(source.randint(1, 9))]
            else:
                parts.append(source.choice(WORDS if choice < 0.92 else special))
        yield "".join(parts)


def dense_texts(count: int, seed: int) -> Iterator[str]:
    """Short texts of few different characters, so that all neighbourhoods come about."""
    source = random.Random(seed)
    for _ in range(count):
        some = source.sample(CLASSES, source.choice([2, 3, 5, 9, len(CLASSES)]))
        yield "".join(source.choice(some) for _ in range(source.randint(1, 14)))
