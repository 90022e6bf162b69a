#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, safetensors 0.8.0.
# Expected: a tensor of int8 (or FP8) numbers where the model has a floating-point parameter, and no quantization_config
#   in config.json, is a mismatch: it is reported as one, or refused, since its numbers mean nothing without a scale.
# Happens: the integers are cast to float32 and become the weights. loading_info says nothing of the tensor; only a scale
#   that lies beside it under another name is listed as unexpected. Where the scales are kept elsewhere (a file of their
#   own, a sidecar of the quantising tool) all of loading_info is empty.
# Why it matters: a checkpoint whose config.json lost its quantization_config, as after a re-save of the configuration,
#   loads without an error and computes with weights that are a hundred times too large.
# Exits with 0 if this is seen, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import safetensors.torch, torch, transformers

transformers.logging.disable_progress_bar()
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                  num_attention_heads=4, num_key_value_heads=2)
model = transformers.LlamaForCausalLM(config)
model.save_pretrained("model")
name = "model.layers.0.self_attn.q_proj.weight"
tensors = safetensors.torch.load_file("model/model.safetensors")
scale = tensors[name].abs().max() / 127
tensors[name] = (tensors[name] / scale).round().to(torch.int8)
safetensors.torch.save_file(tensors, "model/model.safetensors", {"format": "pt"})
loaded, info = transformers.AutoModelForCausalLM.from_pretrained("model", output_loading_info=True)
weight = loaded.get_parameter(name)
print("transformers", transformers.__version__, "torch", torch.__version__)
print(f"'{name}' in the file: int8, loaded as {weight.dtype}, largest {weight.abs().max():.0f}; "
      f"before: {model.get_parameter(name).abs().max():.4f}")
print("loading_info:", {key: len(value) for key, value in info.items()})
sys.exit(0 if weight.dtype == torch.float32 and weight.abs().max() == 127 and not any(info.values()) else 1)
PY
