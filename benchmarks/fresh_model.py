"""Train a small Llama on plays, so that quantisation can be judged on weights that were never rounded before.

    python benchmarks/fresh_model.py TEXTS --out DIR [--pattern GLOB] [--held-out NAME] [--steps N] [--batch N]
                                     [--seed N] [--threads N]

Published GGUF files hold weights that are rounded already: rounding them again to the same grid costs nothing, which
says little about a recipe. This makes a model whose weights are float32 as training left them. It learns every text of
the folder TEXTS that matches the pattern, except those whose name contains `--held-out`, and is measured on the latter.

DIR becomes a plain Hugging Face folder (config.json, model.safetensors, tokenizer.json) with fresh_model.json beside:
perplexity on the held-out text, of the model and of token frequencies alone, and all that it was made with. The same
texts, seed, number of threads and machine give the same weights; the defaults take about five minutes on two cores
that have bfloat16 instructions. A run that is cut short goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from harness import environment
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.util.files import check_writable, read_text, write_whole
from sinkexport.util.progress import Report, shown_progress
from sinkrt.errors import SinkError, UsageError, problem

VOCAB_SIZE = 2048
END = "<|end|>"
"""Between two texts, and the end of a generated one."""

LENGTH = 512
"""Tokens that the model sees at a time while it learns."""

LEARNING_RATE, LEAST_LEARNING_RATE, WARM_UP_STEPS = 2e-3, 1e-4, 30
CHECKPOINT_STEPS = 50
Ids = npt.NDArray[np.int64]


def config(bos_eos: int) -> Any:
    """Every matrix has a multiple of 64 inputs, so that each block size of a recipe fits. 5.2M parameters."""
    return transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=bos_eos,
        eos_token_id=bos_eos,
        attention_dropout=0.0,
    )


def find_texts(folder: Path, pattern: str, held_out: str) -> tuple[dict[str, str], dict[str, str]]:
    """(texts to learn, texts held out), by file name, in the order of their names.

    Raises: UsageError if there are none of either, or one cannot be read.
    """
    found = {path.name: read_text(path, "TEXTS") for path in sorted(folder.glob(pattern)) if path.is_file()}
    learnt = {name: text for name, text in found.items() if held_out not in name}
    held = {name: text for name, text in found.items() if held_out in name}
    for what, texts in (("texts to learn", learnt), ("held-out texts", held)):
        if not texts:
            raise UsageError(
                problem(
                    what,
                    received=f"no file like '{pattern}' in '{folder}'",
                    expected="at least one",
                    fix="change TEXTS, --pattern or --held-out",
                )
            )
    return learnt, held


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE: it has a token for every byte, so there is no text that it cannot encode.

    Raises: UsageError if the texts are too short for `VOCAB_SIZE` tokens.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise UsageError(
            problem(
                "texts",
                received=f"{tokenizer.get_vocab_size()} different tokens",
                expected=f"enough for {VOCAB_SIZE}",
                fix="use more text",
            )
        )
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Ids:
    """int64 [N]: the texts with `END` before each, which is what a model first sees of one."""
    end = tokenizer.token_to_id(END)
    return np.concatenate([np.array([end, *tokenizer.encode(text).ids], dtype=np.int64) for text in texts])


def batches(ids: Ids, batch: int, steps: int, seed: int) -> npt.NDArray[np.int64]:
    """Where each sequence of each step starts, int64 [steps, batch]: all of the text in random order, again and again.

    Each pass cuts the text elsewhere.

    Raises: UsageError if the text is shorter than two sequences.
    """
    random = np.random.default_rng(seed)
    span = LENGTH + 1  # each token but the first is a target
    if len(ids) < 2 * span:
        raise UsageError(
            problem("texts", received=f"{len(ids)} tokens", expected=f"at least {2 * span}", fix="use more text")
        )
    starts: list[int] = []
    while len(starts) < steps * batch:
        first = int(random.integers(0, LENGTH))
        starts += random.permutation(np.arange(first, len(ids) - span, LENGTH)).tolist()
    return np.array(starts[: steps * batch]).reshape(steps, batch)


def learning_rate(step: int, steps: int) -> float:
    """A linear warm-up, then a cosine down to `LEAST_LEARNING_RATE`."""
    if step < WARM_UP_STEPS:
        return LEARNING_RATE * (step + 1) / WARM_UP_STEPS
    share = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return LEAST_LEARNING_RATE + (LEARNING_RATE - LEAST_LEARNING_RATE) * (1 + math.cos(math.pi * share)) / 2


def train(
    model: Any, ids: Ids, starts: npt.NDArray[np.int64], checkpoint: Path, report: Report
) -> tuple[list[float], float]:
    """Returns: the loss of every step, nats a token, and the seconds that all steps took.

    checkpoint: written every `CHECKPOINT_STEPS`. A run that is cut short goes on from there when it is started again;
    nothing is drawn at random on the way, so the result is the same. It counts only for the same ids and starts.

    Raises: SystemExit if the loss is not a number any more.
    """
    work = hashlib.sha256(ids.tobytes() + starts.tobytes()).hexdigest()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]  # gains of norms
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses: list[float] = []
    seconds = 0.0
    if checkpoint.is_file() and (saved := torch.load(checkpoint))["work"] == work:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses, seconds = saved["losses"], saved["seconds"]
    since = time.perf_counter() - seconds
    model.train()
    for step, row in enumerate(starts):
        if step < len(losses):
            continue
        sequences = torch.from_numpy(ids[row[:, None] + np.arange(LENGTH + 1)])  # [batch, LENGTH + 1]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(starts))
        with torch.autocast("cpu", dtype=torch.bfloat16):  # matmuls only; weights and their updates are float32
            logits = model(input_ids=sequences[:, :-1], use_cache=False).logits  # [batch, LENGTH, vocab]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"step {step}: the loss is {losses[-1]}; try another --seed or a larger --batch")
        if (step + 1) % CHECKPOINT_STEPS == 0:
            seconds = time.perf_counter() - since
            state = {
                "work": work,
                "losses": losses,
                "seconds": seconds,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, partial := checkpoint.with_suffix(".partial"))
            partial.replace(checkpoint)
        report("train", step + 1, len(starts))
    model.eval()
    return losses, time.perf_counter() - since


def perplexity(model: Any, ids: Ids) -> float:
    """Perplexity of the tokens 1 .. N-1 of ids [N], each predicted from those before it in a piece of `LENGTH`."""
    nats = 0.0
    for start in range(0, len(ids) - 1, LENGTH):
        piece = torch.from_numpy(ids[start : start + LENGTH + 1])
        with torch.no_grad():
            logits = model(input_ids=piece[None, :-1], use_cache=False).logits[0]
        nats += torch.nn.functional.cross_entropy(logits.double(), piece[1:], reduction="sum").item()
    return math.exp(nats / (len(ids) - 1))


def unigram_perplexity(learnt: Ids, held: Ids) -> float:
    """Perplexity of the same tokens under their frequencies in the texts to learn, one added to each count."""
    counts = np.bincount(learnt, minlength=VOCAB_SIZE) + 1.0
    return math.exp(-np.log(counts / counts.sum())[held[1:]].mean())


def run(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    learnt_texts, held_texts = find_texts(arguments.texts, arguments.pattern, arguments.held_out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            problem(
                "--out",
                received=f"'{out}' ({error.strerror})",
                expected="a folder that can be made",
                fix="choose another path",
            )
        ) from None
    check_writable(out / "fresh_model.json", "--out")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    with shown_progress({"tokenizer": "Tokenizer", "train": "Training", "measure": "Measuring"}) as show:
        show("tokenizer", 0, 1)
        tokenizer = train_tokenizer(list(learnt_texts.values()))
        learnt, held = (encode(tokenizer, list(texts.values())) for texts in (learnt_texts, held_texts))
        model = transformers.LlamaForCausalLM(config(tokenizer.token_to_id(END)))
        starts = batches(learnt, arguments.batch, arguments.steps, arguments.seed)
        checkpoint = out / "checkpoint.pt"
        losses, seconds = train(model, learnt, starts, checkpoint, show)
        show("measure", 0, 1)
        model_perplexity = perplexity(model, held)
    checkpoint.unlink(missing_ok=True)
    model.save_pretrained(out)
    SourceTokenizer("fresh", tokenizer, special_tokens={"bos_token": END, "eos_token": END}).save(out)
    facts = {
        "environment": environment(arguments.threads),
        "learnt": sorted(learnt_texts),
        "learnt_tokens": len(learnt),
        "held_out": sorted(held_texts),
        "held_out_tokens": len(held),
        "parameters": model.num_parameters(),
        "steps": arguments.steps,
        "tokens_per_step": arguments.batch * LENGTH,
        "seed": arguments.seed,
        "seconds": seconds,
        "losses": losses,
        "perplexity": model_perplexity,
        "unigram_perplexity": unigram_perplexity(learnt, held),
    }
    write_whole(out / "fresh_model.json", json.dumps(facts, indent=1) + "\n", "--out")
    seen = arguments.steps * arguments.batch * LENGTH
    print(
        f"{out}: {model.num_parameters() / 1e6:.1f}M parameters, {arguments.steps} steps of {arguments.batch} x "
        f"{LENGTH} tokens ({seen / len(learnt):.2f} passes) in {facts['seconds']:.0f} s; last losses "
        f"{np.mean(losses[-20:]):.2f} nats"
    )
    print(
        f"perplexity of {', '.join(facts['held_out'])} ({len(held):,} tokens, never seen): {model_perplexity:.1f}; "
        f"of token frequencies alone: {facts['unigram_perplexity']:.1f}"
    )


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="a folder of UTF-8 texts")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--pattern", default="*_gut.txt", help="which files of TEXTS (default: %(default)s)")
    parser.add_argument("--held-out", default="hamlet", help="files to measure on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.batch, arguments.threads) < 1:
        parser.error("--steps, --batch and --threads take numbers >= 1")
    try:
        run(arguments)
    except SinkError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
