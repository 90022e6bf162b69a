#!/usr/bin/env bash
# llama.cpp of October 2026 (xllamacpp 2026.10.11549), files written with gguf 0.19.0.
#
# One would expect: a key that llama.cpp's own converter copies from a checkpoint's configuration has an effect when
# llama.cpp runs the file, or is named as ignored.
# What happens: for architecture llama the converter writes rope.scaling.yarn_beta_fast, .yarn_beta_slow and
# .yarn_attn_factor (the configuration's beta_fast, beta_slow, attention_factor), and the runtime reads none of the
# three: every probability is the same, bit for bit, with them and without. rope.scaling.attn_factor, which looks like a
# synonym, is read. phi3.attention.sliding_window is written and turned off on loading, so a Phi-3 mini attends past its
# window of 2,047 tokens.
# Why it matters: llama.cpp's logits are the usual reference for a GGUF reader, and for these keys they are not those of
# the model that was converted.
#
# Needs a network. Exits with 1 if the behaviour is not seen.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6 xllamacpp==2026.10.11549
cd "$work"
cat > show.py <<'PY'
import gguf, numpy as np, xllamacpp

VOCAB, HIDDEN, LAYERS, HEADS, FF = 96, 64, 2, 4, 96
PROMPT = [1, 17, 42, 8, 90, 33, 61, 5, 77, 24, 50, 12, 66, 39]
print("xllamacpp", xllamacpp.__version__)


def write(name, arch, keys):
    r = np.random.default_rng(0)
    matrix = lambda *s: (r.standard_normal(s) * 1.6 / s[-1] ** 0.5).astype(np.float32)
    w = gguf.GGUFWriter(f"{name}.gguf", arch)
    for key, v in {"block_count": LAYERS, "context_length": 512, "embedding_length": HIDDEN, "feed_forward_length": FF,
                   "attention.head_count": HEADS, "attention.layer_norm_rms_epsilon": 1e-5, **keys}.items():
        add = {int: w.add_uint32, float: w.add_float32, str: w.add_string}[type(v)]
        add(f"{arch}.{key}", v)
    w.add_tokenizer_model("llama")
    w.add_token_list(["<unk>", "<s>", "</s>", "<0x0A>", *(f"w{i}" for i in range(4, VOCAB))])
    w.add_token_scores([-float(i) for i in range(VOCAB)])
    w.add_token_types([2, 3, 3, 6, *[1] * (VOCAB - 4)])
    w.add_bos_token_id(1); w.add_eos_token_id(2); w.add_unk_token_id(0)
    t = {"token_embd.weight": matrix(VOCAB, HIDDEN) * 4, "output_norm.weight": np.ones(HIDDEN, np.float32),
         "output.weight": matrix(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        for n in ("attn_norm", "ffn_norm"):
            t[f"blk.{i}.{n}.weight"] = np.ones(HIDDEN, np.float32)
        shapes = {"attn_output": (HIDDEN, HIDDEN), "ffn_down": (HIDDEN, FF)}
        if arch == "phi3":
            shapes |= {"attn_qkv": (3 * HIDDEN, HIDDEN), "ffn_up": (2 * FF, HIDDEN)}
        else:
            shapes |= {f"attn_{x}": (HIDDEN, HIDDEN) for x in "qkv"} | {"ffn_gate": (FF, HIDDEN), "ffn_up": (FF, HIDDEN)}
        for n, s in shapes.items():
            t[f"blk.{i}.{n}.weight"] = matrix(*s) * (2 if n in ("attn_q", "attn_k", "attn_qkv") else 1)
    for n, v in t.items():
        w.add_tensor(n, v)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def probabilities(name, arch, keys):
    write(name, arch, keys)
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity = f"{name}.gguf", 256, 1, False, -1
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    p.fit_params = False
    answer = xllamacpp.Server(p).handle_completions({
        "prompt": PROMPT, "n_predict": 1, "n_probs": VOCAB, "temperature": 0.0, "ignore_eos": True,
        "post_sampling_probs": False, "cache_prompt": False})
    (step,) = answer["choices"][0]["logprobs"]["content"]
    return np.array([p for _, p in sorted((token["id"], token["logprob"]) for token in step["top_logprobs"])])


yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
        "rope.freq_base": 100.0}
cases = {
    "llama.rope.scaling.yarn_beta_fast": ("llama", yarn, {"rope.scaling.yarn_beta_fast": 4.0}, False),
    "llama.rope.scaling.yarn_beta_slow": ("llama", yarn, {"rope.scaling.yarn_beta_slow": 3.0}, False),
    "llama.rope.scaling.yarn_attn_factor": ("llama", yarn, {"rope.scaling.yarn_attn_factor": 1.5}, False),
    "llama.rope.scaling.attn_factor": ("llama", yarn, {"rope.scaling.attn_factor": 1.5}, True),
    "phi3.attention.sliding_window": ("phi3", {}, {"attention.sliding_window": 4}, False),
}
seen = True
for number, (what, (arch, keys, more, read)) in enumerate(cases.items()):
    without = probabilities(f"a{number}", arch, keys)
    change = abs(probabilities(f"b{number}", arch, keys | more) - without).max() / without.std()
    print(f"{what:38s} = {list(more.values())[0]}: log probabilities change by {change:.3g} of their spread")
    seen &= (change > 0.01) == read and (read or change == 0)
raise SystemExit(0 if seen else 1)
PY
"$work/venv/bin/python" show.py 2>/dev/null
