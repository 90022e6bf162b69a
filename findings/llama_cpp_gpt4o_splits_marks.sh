#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549), tokenizer.ggml.pre = gpt-4o (also llama4); peer: tiktoken 0.13.0.
#
# One would expect: llama.cpp splits text for gpt-4o as o200k's own pattern does, which it names in its source.
# What happens: its regular expressions know neither upper and lower case outside ASCII nor combining marks as parts of
# words. A Hindi word falls apart at each vowel sign, and "имяПользователя" is one piece where tiktoken makes two.
# The vocabulary here is the same on both sides, so that only the split can make ids differ; ASCII text agrees.
# Why it matters: gpt-oss and Llama 4 GGUF files are fed other ids than the models were trained with, in Hindi and other
# scripts with vowel signs for nearly every word, and "llama.cpp's ids" is no oracle for such text.
#
# Needs a network. Exits with 1 if the behaviour is not seen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6 tiktoken==0.13.0 xllamacpp==2026.10.11549
cd "$work"
cat > show.py <<'PY'
import json
import os
import sys
import urllib.request

import gguf
import numpy as np
import tiktoken
import tiktoken_ext.openai_public as public
import xllamacpp

print("xllamacpp", xllamacpp.__version__, "tiktoken", tiktoken.__version__)
public.load_tiktoken_bpe = lambda *args, **kwargs: {}  # only the pattern is wanted
pattern = public.o200k_base()["pat_str"]

TEXTS = {"ascii": "helloWorld isn't 12345 ok", "hindi": "नमस्ते दुनिया", "camel": "имяПользователя"}

# All bytes, then merges of whole words from the left.
tokens = [bytes([byte]) for byte in range(256)]
merges = []
for text in TEXTS.values():
    for word in text.split():
        for end in range(2, len(word.encode()) + 1):
            whole = word.encode()[:end]
            if whole not in tokens:
                merges.append((whole[:-1], whole[-1:]))
                tokens.append(whole)
ranks = {token: rank for rank, token in enumerate(tokens)}
own = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
others = iter(range(0x100, 0x200))
sign = {byte: chr(byte) if byte in plain else chr(next(others)) for byte in range(256)}
show = lambda data: "".join(sign[byte] for byte in data)

HIDDEN, HEADS = 32, 2
writer = gguf.GGUFWriter("tiny.gguf", "llama")
writer.add_context_length(512)
writer.add_embedding_length(HIDDEN)
writer.add_block_count(1)
writer.add_feed_forward_length(HIDDEN)
writer.add_head_count(HEADS)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-4o")
writer.add_token_list([show(token) for token in tokens])
writer.add_token_merges([f"{show(first)} {show(second)}" for first, second in merges])
writer.add_bos_token_id(0)
writer.add_eos_token_id(1)
block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
block |= dict.fromkeys(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"], (HIDDEN, HIDDEN))
shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path = "tiny.gguf"
params.n_ctx, params.warmup, params.verbosity = 256, False, 0
server = xllamacpp.Server(params)


def peer(text):
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        data=json.dumps({"content": text, "add_special": False}).encode(),
        headers={"Content-Type": "application/json"},
    )
    return json.load(urllib.request.urlopen(request))["tokens"]


same = {}
for name, text in TEXTS.items():
    ours, theirs = own.encode(text), peer(text)
    same[name] = ours == theirs
    print(f"{name}: {text}")
    print("  tiktoken ", len(ours), [tokens[index].decode(errors="replace") for index in ours])
    print("  llama.cpp", len(theirs), [tokens[index].decode(errors="replace") for index in theirs])
seen = same == {"ascii": True, "hindi": False, "camel": False}
print("seen" if seen else "not seen")
sys.stdout.flush()
os._exit(0 if seen else 1)
PY
venv/bin/python show.py
