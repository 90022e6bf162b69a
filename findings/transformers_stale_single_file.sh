#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, safetensors 0.8.0.
# Expected: a folder that holds both a whole model.safetensors and model.safetensors.index.json with the shards that it
#   names is ambiguous; either the index is followed, or the two are reported.
# Happens: model.safetensors is read, the index and its shards are not looked at, and nothing is logged.
# Why it matters: saving a large model over a small one, or a trainer's sharded save into a folder of an earlier step,
#   leaves both. The stale weights load with empty loading_info, so no check that builds on it can see them.
# Exits with 0 if this is seen, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import json, logging, pathlib, sys
import safetensors.torch, torch, transformers

records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
transformers.logging.disable_progress_bar()
logging.getLogger("transformers").addHandler(Keep())

folder = pathlib.Path("model")
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(0)
old = transformers.LlamaForCausalLM(config)
torch.manual_seed(1)
new = transformers.LlamaForCausalLM(config)
old.save_pretrained(folder)  # an earlier save, one file
tensors = {name: value.contiguous() for name, value in new.state_dict().items()}
names = sorted(tensors)
placed = {}
for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):  # a later one, in shards
    file = f"model-{i:05d}-of-00002.safetensors"
    safetensors.torch.save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
    placed |= dict.fromkeys(part, file)
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))

records.clear()
loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
is_old = torch.equal(loaded.lm_head.weight, old.lm_head.weight)
is_new = torch.equal(loaded.lm_head.weight, new.lm_head.weight)
warned = [r for r in records if "index" in r or "shard" in r or "safetensors" in r]
print("transformers", transformers.__version__, "torch", torch.__version__)
print("files:", sorted(p.name for p in folder.glob("*.safetensors*")))
print("weights of the single file:", is_old, " of the index:", is_new)
print("loading_info:", {key: len(value) for key, value in info.items()}, " warnings about it:", warned)
sys.exit(0 if is_old and not is_new and not any(info.values()) and not warned else 1)
PY
