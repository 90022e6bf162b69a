#!/usr/bin/env bash
# compressed-tensors 0.17.0 and 0.18.0, torch 2.13.0, transformers 5.23.0.
# Expected: a checkpoint of pack-quantized weights is read as it was written, by a later version too, or refused.
# Happens: up to 0.17 an int32 holds 10 fields of 3 bits and 2 unused bits; from 0.18 on fields follow each other without
#   gaps. Format, configuration and names are the same, and nothing compares the length of a row with what it should be:
#   0.18 reads a row of 32 words where it writes 30. Of 320 weights the first 10 are right. 5, 6 and 7 bits are alike.
# Why it matters: a 3-bit model that was saved a few months ago loads without a word and has random weights.
# Exits with 0 if this is seen, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6 psutil==7.2.2 compressed-tensors==0.17.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

values = torch.arange(-4, 4, dtype=torch.int8).repeat(40)[None]  # [1, 320]
packed = pack_to_int32(values, 3)
assert torch.equal(unpack_from_int32(packed, 3, values.shape), values)
torch.save({"values": values, "packed": packed}, "saved.pt")
PY
"$work/venv/bin/pip" install --quiet --disable-pip-version-check compressed-tensors==0.18.0
"$work/venv/bin/python" - <<'PY'
import sys
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

saved = torch.load("saved.pt")
values, packed = saved["values"], saved["packed"]
found = unpack_from_int32(packed, 3, values.shape)
same = (found == values)[0]
print(f"0.17 wrote {packed.shape[1]} words, 0.18 writes {pack_to_int32(values, 3).shape[1]}")
print(f"0.18 reads {int(same.sum())} of {same.numel()} weights as they were, the first wrong one is number "
      f"{int((~same).nonzero()[0])}")
sys.exit(0 if packed.shape[1] == 32 and same[:10].all() and same.float().mean() < 0.3 else 1)
PY
