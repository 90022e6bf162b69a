#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0.
# Expected: a text in two calls with a cache has the logits of the text in one call.
# Happens: layers of Mamba (Mamba, Falcon Mamba, Jamba, Zamba) forget in every later call of more than one token. The
#   torch code reads the cached state in calls of one token only; the scan of a longer call starts from zeros. Logits
#   are off by one to several times their spread, and nothing is reported. Steps of one token are right, and so are
#   layers of Mamba-2 (Mamba-2, Falcon-H1) and short convolutions (LFM2).
# Why it matters: a prompt in chunks, a second turn on a kept cache, and cached prefixes give other text.
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


one = dict(mamba_d_state=8, mamba_dt_rank=4)
two = dict(mamba_n_heads=12, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2)
scan = dict(state_size=8, num_hidden_layers=2, time_step_rank=4)
MODELS = {
    "mamba": scan,
    "falcon_mamba": scan,
    "jamba": heads | one | dict(num_hidden_layers=2, num_experts=1, attn_layer_period=2, attn_layer_offset=1),
    "zamba": heads | one | dict(num_hidden_layers=4, attention_hidden_size=96, attention_head_dim=16, n_mamba_heads=2,
                                layers_block_type=["linear_attention", "hybrid"] * 2),
    "mamba2": dict(num_heads=12, head_dim=8, state_size=16, num_hidden_layers=2, n_groups=2),
    "falcon_h1": heads | two | dict(num_hidden_layers=2, head_dim=8, mamba_d_ssm=96),
    "lfm2": heads | dict(num_hidden_layers=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
}
forget = []
for name, arguments in MODELS.items():
    model = tiny(name, **arguments)
    halves, steps = error(model, [12, 12]), error(model, [12, *[1] * 12])
    print(f"{name:12} 12 tokens and 12: {halves:.1e} of the spread; 12 tokens, then one by one: {steps:.1e}")
    if halves > 0.1 and steps < 0.01:
        forget.append(name)
sys.exit(0 if forget == ["mamba", "falcon_mamba", "jamba", "zamba"] else 1)
PY
