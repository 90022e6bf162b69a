#!/usr/bin/env bash
# transformers 5.23.0 and sentencepiece 0.2.3: a folder with only tokenizer.model gives other ids than sentencepiece.
#
# Expected: a Llama folder that has tokenizer.model and no tokenizer.json encodes as the sentencepiece model does: a
# space is put before every text, also before one that begins with a space.
# Seen: with tokenizer_class LlamaTokenizer the space before a text that begins with one is missing (Metaspace does not
# prepend where a space stands already), and without tokenizer_class no space at all is put before texts.
# Matters: prompts that begin with a space, or all prompts, start with other tokens than the model was trained on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
"$work/venv/bin/python" - "$work" <<'PYTHON'
import io
import json
import pathlib
import sys

import sentencepiece
import transformers

transformers.utils.logging.set_verbosity_error()
written = io.BytesIO()
lines = ["Hello world, hello again", "the quick brown fox", "Hello the fox says hello"] * 20
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=written, vocab_size=300, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
)
theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
print(f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}")
differing = {}
for config in ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, {}):
    folder = pathlib.Path(sys.argv[1], f"model{len(config)}")
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("Hello", " Hello", "  Hello"):
        got, want = loaded.tokenize(text), theirs.encode(text, out_type=str)
        print(f"{json.dumps(config)} {type(loaded).__name__} {text!r}: {got}, sentencepiece {want}")
        differing[len(config), text] = got != want
if not (differing[2, " Hello"] and differing[0, "Hello"]):
    sys.exit("not seen: the ids are sentencepiece's")
PYTHON
