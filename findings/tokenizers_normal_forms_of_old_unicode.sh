#!/usr/bin/env bash
# tokenizers 0.23.3: NFC, NFD, NFKC and NFKD are those of an old Unicode (marks since version 10 or so are not known).
#
# Expected: the normal forms of Unicode, as unicodedata gives them: marks sorted by class, canonically equal texts become
#           one text, in one library one version of Unicode.
# Happens:  marks that came later (here U+08D3 of Unicode 11 and U+0898 of Unicode 14) count as letters: marks are not
#           sorted across them and do not compose across them. The \p{M} of the same library's patterns knows both.
# Matters:  two spellings of one text keep different ids behind `"normalizer": {"type": "NFC"}` (Qwen, GPT-NeoX), and
#           whoever normalizes with another library before or instead (ICU, Python, Rust's current crate) gets other ids.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip install --quiet --quiet --disable-pip-version-check --target "$work/packages" tokenizers==0.23.3
cat > "$work/see.py" <<'PYTHON'
import sys
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

print("tokenizers", tokenizers.__version__, "Python's Unicode", unicodedata.unidata_version)
differ = 0
for form, text in (("NFD", "a\u0307\u08d3"), ("NFC", "a\u0898\u0323"), ("NFD", "a\u0307\u0323")):
    theirs = getattr(normalizers, form)().normalize_str(text)
    wanted = unicodedata.normalize(form, text)
    differ += theirs != wanted
    print(form, *(f"{name}: {' '.join(f'{ord(c):04x}' for c in value)}" for name, value in
                  (("of", text), ("tokenizers", theirs), ("unicodedata", wanted))), sep="   ")
marks = pre_tokenizers.Split(Regex(r"\p{M}+"), "isolated").pre_tokenize_str("a\u08d3\u0898")
print(r"\p{M}+ of tokenizers matches both:", len(marks) == 2 and marks[1][1] == (1, 3))
sys.exit(differ != 2)
PYTHON
PYTHONPATH="$work/packages" python3 "$work/see.py"
