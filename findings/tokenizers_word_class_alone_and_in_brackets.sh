#!/usr/bin/env bash
# tokenizers 0.23.3 (Oniguruma 6.9): \w matches other characters alone than in brackets.
#
# Expected: \w and [\w] are the same set; so are \W and [^\w], as in Python, ICU, PCRE2 and Rust's regex.
# Happens:  alone, \w takes the six small digits and fractions of Latin-1 (U+00B2, U+00B3, U+00B9, U+00BC to U+00BE); in
#           brackets it does not. The pre-tokenizer Whitespace (\w+|[^\w\s]+, of another engine) takes none of the six, but
#           U+200C and U+200D, which neither form takes here.
# Matters:  Split patterns rewritten from \w+ to [\w]+, or ported to another engine, cut texts such as "x2" with a raised
#           two elsewhere, and give other ids.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip install --quiet --quiet --disable-pip-version-check --target "$work/packages" tokenizers==0.23.3
cat > "$work/see.py" <<'PYTHON'
import sys

import tokenizers
from tokenizers import Regex, pre_tokenizers


def words(splitter):
    """Code points that a splitter keeps with a letter before them."""
    return {code for code in range(0x80, 0x3000) if len(splitter.pre_tokenize_str("a" + chr(code) + "a")) == 1}


alone, inside = (words(pre_tokenizers.Split(Regex(pattern), "isolated")) for pattern in (r"\w+", r"[\w]+"))
rust = words(pre_tokenizers.Whitespace())
names = {"only \\w": alone - inside, "only [\\w]": inside - alone, "only Whitespace": rust - alone - inside,
         "not Whitespace": (alone & inside) - rust}
print("tokenizers", tokenizers.__version__)
for name, found in names.items():
    print(f"{name}:", " ".join(f"U+{code:04X}" for code in sorted(found)) or "none")
sys.exit(names["only \\w"] != {0xB2, 0xB3, 0xB9, 0xBC, 0xBD, 0xBE})
PYTHON
PYTHONPATH="$work/packages" python3 "$work/see.py"
