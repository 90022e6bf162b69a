#!/usr/bin/env bash
# transformers 5.23.0: add_bos_token in tokenizer_config.json is dropped where a tokenizer.json is in the folder.
#
# Expected: a folder whose tokenizer_config.json says "add_bos_token": true encodes texts with the beginning-of-text
# token first, as transformers 4 did for LlamaTokenizerFast (DeepSeek's folders rely on it: their tokenizer.json has no
# template that adds the token). The attribute of the loaded tokenizer is False and no warning is given.
# Seen: no token is put before texts; only a caller who sets the attribute again gets it.
# Matters: prompts of such models begin without the token that every training text began with.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import pathlib
import sys

import tokenizers
import transformers

folder = pathlib.Path(sys.argv[1], "model")
folder.mkdir()
library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
library.add_special_tokens(["<s>", "</s>"])
library.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)  # as in DeepSeek-V3's file: adds nothing
library.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
(folder / "tokenizer_config.json").write_text(json.dumps(config))

loaded = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
ids = loaded("a b")["input_ids"]
print(f"transformers {transformers.__version__}: add_bos_token is {loaded.add_bos_token}, ids of 'a b': {ids}")
print(f"the file says: {json.dumps(config)}")
if ids[:1] == [loaded.bos_token_id]:
    sys.exit("not seen: the token is added")
loaded.add_bos_token = True
print(f"after setting it by hand: {loaded('a b')['input_ids']}")
PYTHON
