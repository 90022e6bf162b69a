#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0.
# Expected: from_pretrained gives every parameter the numbers of the file.
# Happens: with `rescale_prenorm_residual` in config.json, which is about initial weights, out_proj.weight of each Mamba,
#   Mamba-2 and Falcon Mamba layer is divided by sqrt(num_hidden_layers) after it was loaded. _init_weights divides
#   with `/=`, which the mark "loaded already" does not stop. loading_info reports nothing.
# Why it matters: a model that was trained with the option, saved and loaded computes something else each time.
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
transformers.logging.disable_progress_bar()
print("transformers", transformers.__version__, "torch", torch.__version__)
sizes = dict(vocab_size=64, hidden_size=48, num_hidden_layers=4)
families = {"mamba": dict(state_size=8), "mamba2": dict(head_dim=8, num_heads=12), "falcon_mamba": dict(state_size=8)}
shares = {}
for name, more in families.items():
    for rescale in (False, True):
        config = transformers.AutoConfig.for_model(name, **sizes, **more, rescale_prenorm_residual=rescale)
        saved = transformers.AutoModelForCausalLM.from_config(config)
        saved.save_pretrained(name)
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
        old, new = (model.backbone.layers[0].mixer.out_proj.weight.detach() for model in (saved, loaded))
    shares[name, rescale] = float(new.norm() / old.norm())
        print(f"{name}, rescale_prenorm_residual={rescale}: out_proj is {shares[name, rescale]:.3f} times that of the "
              f"file; loading_info {sum(map(len, info.values()))} entries")
seen = all(abs(share - (0.5 if rescale else 1.0)) < 1e-3 for (_, rescale), share in shares.items())
sys.exit(0 if seen else 1)
PY
