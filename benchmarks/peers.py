"""Prepare what the peers need: a plain Hugging Face folder, and a model built by onnxruntime-genai.

Both are kept in a cache folder, so that a second benchmark starts at once.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def plain_folder(model: Path, cache: Path) -> Path:
    """`model` itself if it is a folder; for a ``.gguf`` file a float32 safetensors copy of it.

    The copy is dequantised once, so that every contender computes with the very same weights.
    """
    if model.is_dir():
        return model
    target = cache / f"{model.stem}-float32"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(model.parent), "gguf_file": model.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain now, but the config still says "gguf", which save_pretrained refuses to write.
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(target)
    return target


def genai_folder(folder: Path, cache: Path, python: str = sys.executable) -> Path:
    """An fp32 CPU model that onnxruntime-genai's builder makes of the Hugging Face folder `folder`."""
    target = cache / f"{folder.name}-genai-fp32"
    if (target / "genai_config.json").is_file():
        return target
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    run_export("genai", folder, partial, python)
    partial.rename(target)
    return target


def run_export(kind: str, folder: Path, out: Path, python: str) -> dict[str, float]:
    """Run ``export_worker.py``; its figures. What the exporters print is shown only if they fail."""
    command = [python, str(HERE / "export_worker.py"), kind, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr[-4000:]}\n{kind}: export ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout))
