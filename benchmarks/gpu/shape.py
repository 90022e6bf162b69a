"""Bundles of Llama's shapes with random weights: what a step costs depends on shapes alone.

    python benchmarks/gpu/shape.py OUT --layers 32 --window 4092 [--recipe int8-channel] [--target tensorrt]
    python benchmarks/gpu/shape.py OUT --from BUNDLE --window 1020      the same weights, another window

Weights repeat one random block, small enough that logits stay finite. No prefill graph, no tokenizer.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from sinkrt.contract import MANIFEST_NAME, hash_file, load_manifest

BLOCK = 1 << 20
LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def random_llama(layers: int, dtype: str = "float16", device: str = "cpu") -> Any:
    """transformers' LlamaForCausalLM in Llama-2-7B's shapes with this many layers; not trained."""
    import torch
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=layers, dtype=dtype, **LLAMA_2_7B)
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.01).to(getattr(torch, dtype)).to(device)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(getattr(torch, dtype)).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            flat = parameter.view(-1)
            whole = flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)
            whole.copy_(block.expand_as(whole))
            flat[whole.numel() :].copy_(block[: flat.numel() - whole.numel()])
    # Buffers are not parameters: those of the rotary embedding have to be computed anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.eval()


def export_shape(out: Path, layers: int, window: int, recipe: str | None, target: str) -> None:
    """Export a random model to the bundle `out`."""
    from sinkexport.config import ExportConfig
    from sinkexport.pipeline.export import export_loaded
    from sinkexport.quant.recipe import load_recipe
    from sinkexport.sources import LoadedModel

    config = ExportConfig(
        num_sink_tokens=4,
        window_size=window,
        dtype="fp16",
        chunk_size=1,
        target=target,
        recipe=None if recipe is None else load_recipe(recipe),
    )
    export_loaded(LoadedModel(random_llama(layers), None, f"llama-2-7b-shape-{layers}"), out, config, overwrite=True)


def with_window(source: Path, out: Path, window: int) -> None:
    """The bundle `source`, exported with the plugin and without prefill, with another window. Weights are linked."""
    import onnx

    manifest = load_manifest(source)
    if manifest.plugin_abi is None or set(manifest.graphs) != {"decode"}:
        raise SystemExit(
            f"'{source}': received a bundle whose graphs know the window, expected one with the plugin "
            "and without prefill"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in manifest.files:
        if name != "decode.onnx":
            (out / name).unlink(missing_ok=True)
            os.link(source / name, out / name)
    model = onnx.load(str(source / "decode.onnx"), load_external_data=False)
    names = {n for state in manifest.states if state.kind.startswith("window") for n in (state.input, state.output)}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.name in names:
            value.type.tensor_type.shape.dim[2].dim_value = window  # [B, Hkv, W, D], or [B, Hkv, W]
    onnx.save_model(model, str(out / "decode.onnx"))
    states = tuple(
        state
        if state.input not in names
        else dataclasses.replace(state, shape=(*state.shape[:2], window, *state.shape[3:]))
        for state in manifest.states
    )
    changed = dataclasses.replace(
        manifest,
        states=states,
        stream=dataclasses.replace(manifest.stream, window_size=window),
        engines=None,
        files={**manifest.files, "decode.onnx": hash_file(out / "decode.onnx")},
    )
    (out / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")


def main() -> None:
    """Make a bundle and report how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--window", type=int, default=4092)
    parser.add_argument("--recipe")
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--from", dest="source", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    if arguments.source is not None:
        with_window(arguments.source, arguments.out, arguments.window)
    else:
        export_shape(arguments.out, arguments.layers, arguments.window, arguments.recipe, arguments.target)
    print(f"{arguments.out}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
