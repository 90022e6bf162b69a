#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0.
# Expected: without position_ids a model counts on from the tokens in its cache, as Llama does.
# Happens: Bamba counts from 0 in every call. A text in two calls, or a prompt and single tokens, has logits that are
#   off by one to two times their spread. With position_ids both are right, and so is generate(), which gives them.
# Why it matters: a decoding loop of one's own that works with Llama gives other text with Bamba, without a warning.
# Exits with 0 if this is seen, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import torch, transformers

transformers.logging.set_verbosity_error()
print("transformers", transformers.__version__, "torch", torch.__version__)
sizes = dict(vocab_size=97, hidden_size=48, bos_token_id=1, eos_token_id=2, pad_token_id=0)
heads = dict(intermediate_size=64, num_attention_heads=6, num_key_value_heads=6)


def tiny(name, **arguments):
    """A model with random weights, large enough for every layer to matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **sizes, **arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    return model


@torch.no_grad()
def error(model, lengths, positions=False):
    """Largest error of a logit where a text comes in calls of these lengths, over the spread of all logits."""
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    key = "cache_params" if "mamba" in model.config.model_type else "past_key_values"
    cache, logits, at, whole = None, [], 0, model(ids).logits
    for part in ids.split(lengths, dim=1):
        more = {} if cache is None else {key: cache}
        if positions:
            more["position_ids"] = torch.arange(at, at + part.shape[1])[None]
        out = model(part, use_cache=True, **more)
        cache, at = out[key], at + part.shape[1]
        logits.append(out.logits)
    return float((torch.cat(logits, dim=1) - whole).abs().max() / whole.std())


mamba = dict(mamba_n_heads=12, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2)
MODELS = {
    "llama": heads | dict(num_hidden_layers=2),
    "bamba": heads | mamba | dict(num_hidden_layers=3, attn_layer_indices=[1]),
}
without = {}
for name, arguments in MODELS.items():
    model = tiny(name, **arguments)
    for lengths in ([12, 12], [12, *[1] * 12]):
        bare, given = error(model, lengths), error(model, lengths, positions=True)
        print(f"{name}: {len(lengths)} calls: {bare:.1e} of the spread; with position_ids {given:.1e}")
        without.setdefault(name, []).append(bare > 0.1 and given < 0.01)
sys.exit(0 if without == {"llama": [False, False], "bamba": [True, True]} else 1)
PY
