#!/usr/bin/env bash
# transformers 5.23.0, AutoModelForCausalLM.from_pretrained(gguf_file=..); peer: llama.cpp (xllamacpp 2026.10.11549).
#
# One would expect: a GGUF file that loads without an error is the model that the file describes, or that a key or a
# tensor the loader cannot use is named.
# What happens: the loader keeps a fixed list of keys and tensor names for each architecture and drops the rest without
# a warning at the default log level. Rotary scaling (linear, YaRN, the tensor rope_freqs.weight that Llama 3.1 has),
# StarCoder2's base, StableLM's rotary share, Gemma 2's soft cap and biases in llama files are among it: the logits are
# wrong by 1.5 to 4.6 times their spread, where a file without these keys agrees with llama.cpp to 1e-5. A Mixtral,
# which converters write under the name "llama", gets a dense MLP of random numbers: two loads of one file differ.
# Why it matters: perplexity looks plausible on short texts, so quantised models are evaluated, converted and fine-tuned
# from weights that are not what llama.cpp runs.
#
# Needs a network. Exits with 1 if the behaviour is not seen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 \
    numpy==2.4.6 xllamacpp==2026.10.11549
cd "$work"
cat > show.py <<'PY'
import io, contextlib
from pathlib import Path

import gguf, numpy as np, torch, transformers, xllamacpp

VOCAB, HIDDEN, LAYERS, HEADS, KV, FF = 96, 64, 2, 4, 2, 96
HEAD = HIDDEN // HEADS
PROMPT = [1, 17, 42, 8, 90, 33, 61, 5, 77, 24, 50, 12, 66, 39]
print("transformers", transformers.__version__, "xllamacpp", xllamacpp.__version__)


def model(arch, keys=None, extra=None, biases=False, layer_norm=False, experts=0, gemma=False, plain=False):
    """Metadata and tensors of a random tiny model."""
    r = np.random.default_rng(0)
    matrix = lambda *s: (r.standard_normal(s) * 1.6 / s[-1] ** 0.5).astype(np.float32)
    vector = lambda n, about=0.0: (about + 0.3 * r.standard_normal(n)).astype(np.float32)
    t = {"token_embd.weight": matrix(VOCAB, HIDDEN) * (1.6 if gemma else 4), "output_norm.weight": vector(HIDDEN, 1)}
    if not gemma:
        t["output.weight"] = matrix(VOCAB, HIDDEN)
    norms = ["attn_norm", "ffn_norm"] + (["post_attention_norm", "post_ffw_norm"] if gemma else [])
    rows = {"attn_q": HIDDEN, "attn_k": KV * HEAD, "attn_v": KV * HEAD, "attn_output": HIDDEN, "ffn_up": FF, "ffn_down": HIDDEN}
    if not plain:
        rows["ffn_gate"] = FF
    if layer_norm:
        t["output_norm.bias"] = vector(HIDDEN)
    for i in range(LAYERS):
        for n in norms:
            t[f"blk.{i}.{n}.weight"] = vector(HIDDEN, 1)
            if layer_norm:
                t[f"blk.{i}.{n}.bias"] = vector(HIDDEN)
        for n, count in rows.items():
            if experts and n.startswith("ffn"):
                t[f"blk.{i}.{n}_exps.weight"] = matrix(experts, count, FF if n == "ffn_down" else HIDDEN)
                continue
            t[f"blk.{i}.{n}.weight"] = matrix(count, FF if n == "ffn_down" else HIDDEN) * (2 if n in ("attn_q", "attn_k") else 1)
            if biases:
                t[f"blk.{i}.{n}.bias"] = vector(count)
        if experts:
            t[f"blk.{i}.ffn_gate_inp.weight"] = matrix(experts, HIDDEN) * 2
    eps = "attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"
    k = {"block_count": LAYERS, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": FF,
         "attention.head_count": HEADS, "attention.head_count_kv": KV, eps: 1e-5, **(keys or {})}
    return arch, k, t | (extra or {})


def write(name, arch, keys, tensors):
    w = gguf.GGUFWriter(f"{name}.gguf", arch)
    for key, v in keys.items():
        add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string}[type(v)]
        add(f"{arch}.{key}", v)
    w.add_name("tiny")
    w.add_tokenizer_model("llama")
    w.add_token_list(["<unk>", "<s>", "</s>", "<0x0A>", *(f"w{i}" for i in range(4, VOCAB))])
    w.add_token_scores([-float(i) for i in range(VOCAB)])
    w.add_token_types([2, 3, 3, 6, *[1] * (VOCAB - 4)])
    w.add_bos_token_id(1); w.add_eos_token_id(2); w.add_unk_token_id(0)
    for n, v in tensors.items():
        w.add_tensor(n, v)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def theirs(name, steps=5):
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = f"{name}.gguf", 256, 1, False, -1
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.fit_params = False
    answer = xllamacpp.Server(p).handle_completions({
        "prompt": PROMPT, "n_predict": steps, "n_probs": VOCAB, "temperature": 0.0, "ignore_eos": True,
        "post_sampling_probs": False, "cache_prompt": False})
    content = answer["choices"][0]["logprobs"]["content"]
    table = np.zeros((steps, VOCAB))
    for row, step in zip(table, content):
        for token in step["top_logprobs"]:
            row[token["id"]] = token["logprob"]
    return [step["id"] for step in content], table


def ours(name, ids):
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        m = transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = m(torch.tensor([PROMPT + ids])).logits[0].double()
    return torch.log_softmax(logits[len(PROMPT) - 1 : -1], -1).numpy()


linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
star = dict(layer_norm=True, biases=True, plain=True)
cases = {
    "nothing of the kind": model("llama"),
    "rope_freqs.weight (Llama 3.1)": model("llama", extra={"rope_freqs.weight": np.linspace(1, 6, HEAD // 2).astype(np.float32)}),
    "rope.scaling linear": model("llama", linear),
    "rope.scaling yarn": model("qwen2", yarn),
    "biases in llama": model("llama", biases=True),
    "starcoder2.rope.freq_base": model("starcoder2", {"rope.freq_base": 100.0}, **star),
    "stablelm.rope.dimension_count": model("stablelm", {"rope.dimension_count": 12, "use_parallel_residual": False}, layer_norm=True),
    "gemma2.attn_logit_softcapping": model("gemma2", {"attn_logit_softcapping": 2.0, "attention.sliding_window": 256,
        "attention.key_length": HEAD, "attention.value_length": HEAD}, gemma=True),
    "experts in llama (Mixtral)": model("llama", {"expert_count": 4, "expert_used_count": 2}, experts=4),
}
wrong = []
for number, (what, (arch, keys, tensors)) in enumerate(cases.items()):
    name = f"case{number}"
    write(name, arch, keys, tensors)
    ids, expected = theirs(name)
    first, second = ours(name, ids), ours(name, ids)
    error = abs(first - expected).max() / expected.std()
    print(f"{what:34s} off by {error:8.1e} of the spread; two loads differ by {abs(first - second).max() / expected.std():.1e}")
    if error > 0.05:
        wrong.append(what)
raise SystemExit(0 if set(wrong) == set(cases) - {"nothing of the kind"} else 1)
PY
"$work/venv/bin/python" -W ignore show.py 2>/dev/null
