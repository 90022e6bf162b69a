"""What a bundle gives on ONNX Runtime's CPU, small enough to take to a machine with a GPU.

    python benchmarks/gpu/reference.py BUNDLE OUT.npz [--tokens 500] [--prompt TEXT]

OUT.npz: prompt int32 [P]; tokens int32 [N], greedy; top_ids int32 and top_logits float32 [N, 64], the largest logits
that each token was picked from; spread float32 [N], standard deviation of all of them.

Matmuls with rounded weights are of float32: ONNX Runtime's INT8 arithmetic would round their inputs too, by some
percent of the logits, which a GPU does not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from sinkexport.pipeline.bundle_writer import hash_bundle
from sinkrt import Session
from sinkrt.contract import MANIFEST_NAME, load_manifest

NUM_TOP = 64
FLOAT32_ARITHMETIC = 1
"""MatMulNBits' accuracy_level."""
PROMPT = "Once upon a time, in a village at the edge of a great forest,"


@contextlib.contextmanager
def float_matmuls(bundle: Path) -> Iterator[Path]:
    """A bundle of target ``onnx`` with the same weights, whose matmuls do not round their inputs."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as name:
        folder = Path(name) / bundle.name
        shutil.copytree(bundle, folder)
        for path in folder.glob("*.onnx"):
            model = onnx.load(path, load_external_data=False)
            for node in model.graph.node:
                for attribute in node.attribute:
                    if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                        attribute.i = FLOAT32_ARITHMETIC
            onnx.save(model, path)
        changed = dataclasses.replace(load_manifest(folder), files=hash_bundle(folder))
        (folder / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")
        yield folder


def reference(bundle: Path, prompt: str, num_tokens: int) -> dict[str, np.ndarray]:
    """Greedy decoding, end of text ignored."""
    with float_matmuls(bundle) as exact, Session.load(exact) as session:
        ids = session.tokenizer.encode(prompt)
        logits = session.prefill(ids)[0]
        tokens, top_ids, top_logits, spread = [], [], [], []
        for _ in range(num_tokens):
            largest = np.argpartition(logits, -NUM_TOP)[-NUM_TOP:]
            largest = largest[np.argsort(-logits[largest], kind="stable")]
            top_ids.append(largest)
            top_logits.append(logits[largest])
            spread.append(logits.std())
            tokens.append(int(logits.argmax()))
            logits = session.step(tokens[-1:])[0]
    return {
        "prompt": np.array(ids, np.int32),
        "tokens": np.array(tokens, np.int32),
        "top_ids": np.array(top_ids, np.int32),
        "top_logits": np.array(top_logits, np.float32),
        "spread": np.array(spread, np.float32),
    }


def compare(logits: np.ndarray, tokens: np.ndarray, want: dict[str, np.ndarray]) -> dict[str, float | int | None]:
    """Logits float32 [N, vocab], of the reference's tokens fed one after the other, and greedy `tokens` [N] against it.

    error: of the logits that were largest in the reference, root mean square over spread, by step. agree: share of
    steps with the same top-1 token. first_divergence: first greedy token that differs; None: none does. margin: how far
    apart the reference's two likeliest tokens lay there, over spread.
    """
    got = np.take_along_axis(logits, want["top_ids"], axis=1)
    errors = np.sqrt(((got - want["top_logits"]) ** 2).mean(axis=1)) / want["spread"]
    different = np.flatnonzero(tokens != want["tokens"])
    first = int(different[0]) if different.size else None
    margins = (want["top_logits"][:, 0] - want["top_logits"][:, 1]) / want["spread"]
    return {
        "steps": len(errors),
        "error_median": float(np.median(errors)),
        "error_max": float(errors.max()),
        "agree": float((logits.argmax(axis=1) == want["top_ids"][:, 0]).mean()),
        "first_divergence": first,
        "margin_there": None if first is None else float(margins[first]),
    }


def main() -> None:
    """Write the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--prompt", default=PROMPT)
    arguments = parser.parse_args()
    np.savez_compressed(arguments.out, **reference(arguments.bundle, arguments.prompt, arguments.tokens))


if __name__ == "__main__":
    main()
