#!/usr/bin/env bash
# tokenizers 0.23.3: an added token of tokenizer.json gets another id than the file says where ids before it are free.
#
# Expected: {"id": 9, "content": "<end>"} among added_tokens encodes to 9, or the file is refused.
# Seen: with a vocabulary of seven tokens it encodes to 7, the next free id, without an error or a warning.
# Matters: embeddings are often padded, and tokens put at the end of the padding; the model then sees a row that was
# never trained, and never the one that ends a turn. Whoever copies a tokenizer.json has to compare the ids.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import json
import sys

import tokenizers

library = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate("abcdefg")}, []))
data = json.loads(library.to_str())
flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
data["added_tokens"] = [{"id": 9, "content": "<end>", **flags, "special": True}]
loaded = tokenizers.Tokenizer.from_str(json.dumps(data))
got = loaded.encode("ab<end>").ids
print(f"tokenizers {tokenizers.__version__}: the file says 9 for <end>, 'ab<end>' gives {got}")
print(f"written again: {json.loads(loaded.to_str())['added_tokens'][0]['id']}")
if got[-1] == 9:
    sys.exit("not seen: the id is the file's")
PYTHON
