"""Prepare what the decoders need: a plain Hugging Face folder, a model built by onnxruntime-genai, an F32 GGUF file.

All are kept in a cache folder, so that a second benchmark starts at once.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LLAMA_TYPES = {
    "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "Q4_1": "LLAMA_FTYPE_MOSTLY_Q4_1",
    "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
}


def plain_folder(model: Path, cache: Path) -> Path:
    """`model` itself if it is a folder; for a ``.gguf`` file a float32 safetensors copy of it.

    The copy is dequantised once, so that every decoder computes with the very same weights.
    """
    if model.is_dir():
        return model
    target = cache / f"{model.stem}-float32"
    if (target / "config.json").is_file():
        return target
    import torch
    from sinkexport.sources import load_tokenizer
    from transformers import AutoModelForCausalLM

    source = {"pretrained_model_name_or_path": str(model.parent), "gguf_file": model.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, trust_remote_code=False)
    # The weights are plain now, but the config still says "gguf", which save_pretrained refuses to write.
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded.save_pretrained(partial)
    if (tokenizer := load_tokenizer(str(model))) is not None:  # to the id: transformers' own of a GGUF file may not be
        tokenizer.save(partial)
    partial.rename(target)
    return target


def float32_gguf(model: Path, cache: Path) -> Path:
    """`model`, a ``.gguf`` file, with the same metadata and its tensors dequantised to F32: no llama.cpp is needed."""
    gguf_file(model, "llama.cpp")
    target = cache / f"{model.stem}-F32.gguf"
    if target.is_file():
        return target
    import gguf

    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        element = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        writer.add_tensor(tensor.name, values.astype(np.float32, copy=False))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def gguf_file(model: Path, peer: str) -> Path:
    """`model` itself, which `peer` reads as it is."""
    if model.suffix.lower() != ".gguf":
        raise SystemExit(f"{peer} needs a .gguf file, not '{model}': leave it out of --peers")
    return model


def llama_gguf(model: Path, cache: Path, kind: str = "F32") -> Path:
    """`model`, a ``.gguf`` file, as llama.cpp itself writes it in another type of weights.

    kind: F32 or a key of `LLAMA_TYPES`; F32 are the very weights that the others have.
    """
    if kind == "F32":
        return float32_gguf(model, cache)
    gguf_file(model, "llama.cpp")
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise SystemExit(
            "llama-cpp-python is not installed: pip install llama-cpp-python (it compiles for a while), or leave "
            "llamacpp out of --peers"
        ) from None
    target = cache / f"{model.stem}-{kind}.gguf"
    if target.is_file():
        return target
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = getattr(llama_cpp, LLAMA_TYPES[kind]), True
    partial = target.with_name(target.name + ".partial")
    if code := llama_cpp.llama_model_quantize(str(model).encode(), str(partial).encode(), options):
        raise SystemExit(f"llama.cpp could not convert '{model}' to {kind}: code {code}")
    partial.rename(target)
    return target


def model_paths(names: Sequence[str], bundle: Path, model: Path, cache: Path, peer_python: str) -> dict[str, Path]:
    """The model that each decoder loads, made if it is not there. cache: created; model: folder or ``.gguf`` file.

    After a colon a name may say in which type: ``genai:int4``, ``llamacpp:Q8_0``. ``xllamacpp`` and ``openvino`` read
    the file as it is, and of ``:F32`` a float32 copy.
    """
    cache.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in names:
        kind, _, variant = name.partition(":")
        if kind.startswith("sinkexport"):
            paths[name] = bundle
        elif kind == "llamacpp":
            paths[name] = llama_gguf(model, cache, variant or "F32")
        elif kind in ("xllamacpp", "openvino"):
            paths[name] = float32_gguf(model, cache) if variant == "F32" else gguf_file(model, name)
        elif kind == "genai":
            paths[name] = genai_folder(plain_folder(model, cache), cache, peer_python, variant or "fp32")
        else:
            paths[name] = plain_folder(model, cache)
    return paths


def genai_folder(folder: Path, cache: Path, python: str = sys.executable, precision: str = "fp32") -> Path:
    """A CPU model that onnxruntime-genai's builder makes of the Hugging Face folder `folder`.

    precision: ``fp32 | int4``, the latter with the builder's own defaults.
    """
    target = cache / f"{folder.name}-genai-{precision}"
    if (target / "genai_config.json").is_file():
        return target
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    run_export("genai", folder, partial, python, precision)
    partial.rename(target)
    return target


def run_export(
    kind: str, folder: Path, out: Path, python: str, variant: str = "fp32", options: Sequence[str] = ()
) -> dict[str, float]:
    """Run ``export_worker.py``; its figures. What the exporters print is shown only if they fail."""
    command = [python, str(HERE / "export_worker.py"), kind, str(folder), str(out), variant, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr[-4000:]}\n{kind}: export ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout))
