#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0.
# Expected: from_pretrained gives every parameter the numbers of the file.
# Happens: in YoutuForCausalLM the embedding's row of pad_token_id is set to zeros after it was loaded. The class has an
#   _init_weights of its own, which zeroes `weight.data[padding_idx]`: a view that lacks the mark "loaded already". Of
#   a Llama with the same row nothing is lost. loading_info reports nothing.
# Why it matters: the output projection is tied to the embedding by default, so the logit of that token becomes 0 for
#   every text. Where padding and end of text are one token, generation ends at other places.
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

transformers.logging.disable_progress_bar()
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
             num_key_value_heads=4, pad_token_id=3, bos_token_id=1, eos_token_id=2)
latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
print("transformers", transformers.__version__, "torch", torch.__version__)
lost = {}
for config in (transformers.LlamaConfig(**sizes), transformers.YoutuConfig(**sizes, **latent)):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0.5
    model.save_pretrained(config.model_type)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(config.model_type, output_loading_info=True)
    row = loaded.get_input_embeddings().weight[3]
    logit = loaded(torch.tensor([[5, 6, 7]])).logits[0, -1, 3]
    print(f"{config.model_type}: row of the padding token {row.abs().max():.2f}, saved as 0.50; its logit {logit:.3f}; "
          f"loading_info {sum(map(len, info.values()))} entries")
    lost[config.model_type] = not bool(row.any())
sys.exit(0 if lost == {"llama": False, "youtu": True} else 1)
PY
