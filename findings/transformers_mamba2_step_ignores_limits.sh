#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0.
# Expected: a token's logits are the same whether it comes with others or in a call of its own.
# Happens: the torch code for one token of Mamba-2 layers has no limits of time steps; that for more tokens clamps to
#   them. They are time_step_limit in Mamba-2 and (time_step_min, infinity) in Nemotron-H and Zamba2. Where a time step
#   lies outside, generated tokens come from another model than the prompt's. With limits that bind nowhere all agree.
# Why it matters: perplexity of a text in one call says nothing about decoding, and no error or warning does.
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


MODELS = {
    "mamba2": dict(num_heads=12, head_dim=8, state_size=16, num_hidden_layers=2, n_groups=2),
    "nemotron_h": heads | dict(head_dim=8, layers_block_type=["linear_attention", "full_attention", "mlp"],
                               ssm_state_size=16, mamba_num_heads=12, mamba_head_dim=8, n_groups=2),
}
BINDING = {"mamba2": dict(time_step_limit=(0.3, 0.9)), "nemotron_h": dict(time_step_min=0.5, time_step_max=0.9)}
seen = {}
for name, arguments in MODELS.items():
    free, limited = (error(tiny(name, **arguments, **more), [12, *[1] * 12]) for more in ({}, BINDING[name]))
    print(f"{name}: 12 tokens, then one by one: {free:.1e} of the spread by default, {limited:.1e} with {BINDING[name]}")
    seen[name] = free < 0.05 and limited > 0.5
sys.exit(0 if all(seen.values()) else 1)
PY
