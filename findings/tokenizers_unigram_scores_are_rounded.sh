#!/usr/bin/env bash
# tokenizers 0.23.3: Unigram scores in a tokenizer.json are not read to the nearest double.
#
# Expected: a number in JSON is the double nearest to it, as Python's json, JavaScript and C's strtod read it; saving and
#           loading a tokenizer changes nothing.
# Happens:  about one score in seven is off in its last bit (digits as an integer, then one division by a power of ten).
# Matters:  Unigram takes the path of the highest sum and the first of equals. Where a token's score is the sum of its
#           parts', a reader that parses correctly sees a tie and the library does not, or the other way round: another
#           implementation that is right about JSON gives other ids.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip install --quiet --quiet --disable-pip-version-check --target "$work/packages" tokenizers==0.23.3
cat > "$work/see.py" <<'PYTHON'
import json
import random
import sys

import tokenizers

draw = random.Random(1)
# Two characters, and both together with exactly twice the score: a tie, which the longer token comes first in.
words = [chr(0x4E00 + i) for i in range(8000)]
vocabulary = [["<unk>", 0.0]]
for word in words:
    score = -draw.uniform(2, 15)
    vocabulary += [[word, score], [2 * word, 2 * score]]
text = json.dumps({"version": "1.0", "added_tokens": [],
                   "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}})
library = tokenizers.Tokenizer.from_str(text)
read = json.loads(library.to_str())["model"]["vocab"]
changed = [(mine[1], theirs[1]) for mine, theirs in zip(vocabulary, read, strict=True) if mine != theirs]
split = sum(len(library.encode(2 * word).ids) == 2 for word in words)
print("tokenizers", tokenizers.__version__)
print(f"{len(changed)} of {len(vocabulary)} scores changed by loading, such as {changed[0][0]!r} to {changed[0][1]!r}")
print(f"{split} of {len(words)} ties are none any more: the pair is split in two")
sys.exit(not changed or not split)
PYTHON
PYTHONPATH="$work/packages" python3 "$work/see.py"
