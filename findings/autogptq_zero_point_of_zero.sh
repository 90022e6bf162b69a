#!/usr/bin/env bash
# auto-gptq 0.7.1 (its wheel's own qlinear_cuda_old.py, in PyTorch on the CPU), gptqmodel 7.7.0 (its reader of v1), torch 2.13.0.
# Expected: a group whose zero point is 0 (all its weights are positive) is packed and read as any other. The format
#   stores each zero point less one in 4 bits, so 0 becomes 15.
# Happens: AutoGPTQ packs 0 - 1 as 32 bits of ones and ORs them into the word: every later zero point of that word, of up
#   to seven other outputs, becomes 15 as well, which its own kernel reads as 0. The file does not hold them any more.
#   GPTQModel reads the same file by adding 1 to each field of the whole word, where the carry goes on: other numbers.
# Why it matters: weights of a whole group of other outputs shift by up to 15 steps, and nothing is reported by either.
#   A file with a field of all ones has no one meaning.
# Exits with 0 if this is seen, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --python-version 3.11 --platform manylinux2014_x86_64 --dest . auto-gptq==0.7.1
"$work/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest . gptqmodel==7.7.0
"$work/venv/bin/python" -m zipfile -e auto_gptq-0.7.1-*.whl auto_gptq_wheel
tar xzf gptqmodel-7.7.0.tar.gz
"$work/venv/bin/python" - <<'PY'
import ast, importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location(
    "qlinear", "auto_gptq_wheel/auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

K, N, STEP = 64, 64, 0.01
torch.manual_seed(0)
codes = torch.randint(0, 16, (N, K))
zeros = torch.full((N, 1), 8.0)
zeros[0] = 0.0  # of output 0 alone
scales = torch.full((N, 1), STEP)
linear = torch.nn.Linear(K, N, bias=False)
linear.weight.data = (codes - zeros) * scales
packed = module.QuantLinear(4, -1, K, N, bias=False, weight_dtype=torch.float32)
packed.pack(linear, scales.clone(), zeros.clone(), None)
word = int(packed.qzeros[0, 0]) & 0xFFFFFFFF
read = packed(torch.eye(K)).T
off = ((read - linear.weight).abs().max(dim=1).values / STEP).round().int().tolist()
print(f"the first word of zero points: {word:08x}, expected 7777777f")
print("AutoGPTQ's own kernel: steps off, by output", off[:10])

# gptqmodel's function, out of its file: the package itself wants a GPU's libraries.
tree = ast.parse(open("gptqmodel-7.7.0/gptqmodel/utils/model.py").read())
wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "convert_gptq_v1_to_v2_format_module"]
class Base(torch.nn.Module):
    def qzero_format(self, format=None):
        return format
class Log:
    class info:
        once = staticmethod(print)
scope = {"torch": torch, "nn": torch.nn, "BaseQuantLinear": Base, "log": Log}
exec(compile(ast.Module(wanted, []), "model.py", "exec"), scope)
holder = Base()
holder.register_buffer("qzeros", packed.qzeros.clone())
scope["convert_gptq_v1_to_v2_format_module"](holder, 4, torch.int32)
word = int(holder.qzeros[0, 0]) & 0xFFFFFFFF
fields = [word >> 4 * i & 15 for i in range(8)]
print("GPTQModel: zero points of outputs 0 to 7", fields, "expected", [0] + [8] * 7)
intended = int(0x7777777F) - 2**32 * (0x7777777F >= 2**31)
holder.qzeros = torch.tensor([[intended]], dtype=torch.int32)
scope["convert_gptq_v1_to_v2_format_module"](holder, 4, torch.int32)
word = int(holder.qzeros[0, 0]) & 0xFFFFFFFF
carried = [word >> 4 * i & 15 for i in range(8)]
print("GPTQModel, of the word that was expected:", carried)
sys.exit(0 if off[0] == 0 and off[1:8] == [8] * 7 and off[8] == 0 and carried == [0, 9] + [8] * 6 else 1)
PY
