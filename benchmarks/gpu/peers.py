"""What others need for a token of the same shape on the same GPU; each task prints a line of JSON.

    python benchmarks/gpu/peers.py transformers --layers 32 --context 4096    static cache, one CUDA graph a token
    python benchmarks/gpu/peers.py recompute --layers 32 --context 4096       a forward pass over the window a token
    python benchmarks/gpu/peers.py ort-cuda BUNDLE                            a bundle of --target onnx

float16, random weights (shape.py). Times are medians of synchronised runs, milliseconds a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS, WARM_UP = 50, 5


def timed(run: Callable[[], Any], synchronize: Callable[[], Any], runs: int = RUNS) -> dict[str, float]:
    """Median and p99 by the nearest rank, in milliseconds."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(runs):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append((time.perf_counter() - start) * 1000)
    times.sort()
    return {"ms_per_token": statistics.median(times), "p99_ms": times[-(-99 * runs // 100) - 1]}


def transformers_static(layers: int, context: int) -> dict[str, Any]:
    """Hugging Face's model with a full static cache; the step is captured by hand, without compiling."""
    import torch
    import transformers
    from shape import random_llama

    model = random_llama(layers, device="cuda")
    cache = transformers.StaticCache(config=model.config, max_cache_len=context)
    ids = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    position = torch.tensor([context - 1], device="cuda")
    # All tokens are seen; given so that no mask is made, which would need the host.
    mask = torch.zeros(1, 1, 1, context, dtype=torch.float16, device="cuda")

    def step() -> Any:
        return model(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            cache_position=position,
            position_ids=position[None],
            use_cache=True,
        ).logits

    result: dict[str, Any] = {"peer": "transformers, static cache", "transformers": transformers.__version__}
    with torch.inference_mode():
        step()
        result["eager"] = timed(step, torch.cuda.synchronize, runs=15)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            result |= timed(graph.replay, torch.cuda.synchronize)
        except Exception as error:  # what cannot be captured differs between versions
            result["cuda_graph"] = f"not captured: {' '.join(str(error).split())[:200]}"
    return result


def recompute(layers: int, context: int) -> dict[str, Any]:
    """The paper's sliding window with recomputation: every token takes a forward pass over the window."""
    import torch
    from shape import random_llama

    model = random_llama(layers, device="cuda")
    ids = torch.ones(1, context, dtype=torch.int64, device="cuda")
    with torch.inference_mode():
        found = timed(lambda: model(ids, use_cache=False, logits_to_keep=1), torch.cuda.synchronize, runs=11)
    return {"peer": "recomputation", **found}


def ort_cuda(bundle: Path) -> dict[str, Any]:
    """This project's bundle on onnxruntime-gpu, logits copied to the host."""
    import onnxruntime
    from sinkrt import Session

    with Session.load(bundle, "ort-cuda", verify=False) as session:
        ids = [1] * session.batch
        found = timed(lambda: session.step(ids), lambda: None)
        options = session._backend._decode._session.get_provider_options()["CUDAExecutionProvider"]  # type: ignore
        return {
            "peer": "ort-cuda",
            "onnxruntime": onnxruntime.__version__,
            "cuda_graph": options.get("enable_cuda_graph") == "1",
            **found,
        }


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("transformers", "recompute", "ort-cuda"))
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    if arguments.task == "ort-cuda":
        print(json.dumps(ort_cuda(arguments.bundle)))
        return
    run = {"transformers": transformers_static, "recompute": recompute}[arguments.task]
    print(
        json.dumps(
            {**run(arguments.layers, arguments.context), "layers": arguments.layers, "context": arguments.context}
        )
    )


if __name__ == "__main__":
    main()
