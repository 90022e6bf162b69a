"""Find factors on the attention to the first token that make a model answer better, without training.

After ZeroTuning (arXiv:2505.11739), in two steps. Profile: each head (or layer) alone gets the factor `PROBE`. Heads
with which the model gets better want more of the first token, the others less. Search: the most sensitive heads of a
kind, a share of `SHARES` of them, get one factor of `LARGER` or `SMALLER` together. The best of both kinds, alone or
together, is kept if it is better than no factors at all.

Every other example is held out: it shows what the factors are worth on examples that did not choose them. Contexts are
dense: a stream that is shorter than the cache is the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sinkrt.errors import UsageError, problem

from sinkexport.analysis.defaults import OBJECTIVES, UNITS
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.reference.dense import first_token_scaled
from sinkexport.sources import LoadedModel
from sinkexport.util.progress import Report, silent
from sinkexport.variants.sink_tuning import SinkTuningFile, TunedModel

PROBE = 1.5
LARGER, SMALLER = (1.25, 1.5, 2.0, 3.0), (0.8, 0.6, 0.4, 0.2)
SHARES = (0.25, 0.5, 1.0)
BATCH_TOKENS = 512
"""Tokens that run together, padding included: logits of a large vocabulary take the memory."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One line of a labelled file: token ids of a context and of the texts that may follow it.

    answers: the right one first; a text to predict has one, which is all of it but its first token.
    number: of its line.
    """

    context: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    number: int


@dataclasses.dataclass(frozen=True, order=True)
class Score:
    """Less is better, errors first. errors: share of questions answered wrong; 0 for texts and for entropy.

    loss: nats, of the right answer among the others (questions), of a token (texts), or the entropy of predictions.
    """

    errors: float
    loss: float


@dataclasses.dataclass(frozen=True)
class TuneResult:
    """Result of `tune`. before, after: of the examples that chose. held_out_before, held_out_after: of the others."""

    file: SinkTuningFile
    kind: str
    objective: str
    num_examples: int
    num_held_out: int
    before: Score
    after: Score
    held_out_before: Score
    held_out_after: Score


def read_examples(tokenizer: SourceTokenizer, lines: str) -> list[Example]:
    """Read the examples of a JSONL text: {"prompt", "choices", "answer"} or {"text"}, one kind alone.

    answer: the index of a choice, or the choice itself. A text follows what the tokenizer puts before every text.

    Raises: UsageError naming the first line that is wrong.
    """
    start, examples = tokenizer.beginning, []
    kinds = set()
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError:
            raise _bad_line(number, "no JSON") from None
        if not isinstance(raw, dict) or set(raw) not in ({"text"}, {"prompt", "choices", "answer"}):
            raise _bad_line(number, f"keys {sorted(raw)}" if isinstance(raw, dict) else type(raw).__name__)
        kinds.add("text" in raw)
        if "text" in raw:
            ids = (*start, *_ids(tokenizer, raw["text"], number))
            if len(ids) < 2:
                raise _bad_line(number, "a text of fewer than 2 tokens")
            examples.append(Example(ids[:1], (ids[1:],), number))
        else:
            examples.append(_question(tokenizer, start, raw, number))
    if len(kinds) > 1:
        raise UsageError(
            problem("--labelled", received="questions and texts in one file", expected="one kind", fix="split the file")
        )
    if len(examples) < 2:
        raise UsageError(
            problem(
                "--labelled",
                received=f"{len(examples)} examples",
                expected="at least 2: every other one is held out",
                fix="give more",
            )
        )
    return examples


def _question(tokenizer: SourceTokenizer, start: tuple[int, ...], raw: dict[str, Any], number: int) -> Example:
    choices, answer = raw["choices"], raw["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise _bad_line(number, "fewer than 2 choices")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise _bad_line(number, f"answer {answer!r}, which is none of the {len(choices)} choices")
    context = (*start, *_ids(tokenizer, raw["prompt"], number))
    answers = [_ids(tokenizer, choice, number) for choice in choices]
    if not context or not all(answers):
        raise _bad_line(number, "an empty prompt or choice")
    return Example(context, (answers.pop(answer), *answers), number)


def _ids(tokenizer: SourceTokenizer, text: Any, number: int) -> tuple[int, ...]:
    if not isinstance(text, str):
        raise _bad_line(number, f"{type(text).__name__} where a text should be")
    return tuple(tokenizer.encode(text, special=False))


def _bad_line(number: int, received: str) -> UsageError:
    return UsageError(
        problem(
            f"--labelled, line {number}",
            received=received,
            fix="see docs/sink_tuning.md",
            expected='{"prompt": .., "choices": [..], "answer": ..} or {"text": ..}',
        )
    )


def score(model: Any, examples: Sequence[Example], objective: str) -> Score:
    """Score `model`, as its attention is now, on the examples."""
    is_text = len(examples[0].answers) == 1
    # The entropy of the prediction that follows a prompt is the same for all of its choices.
    count = 1 if objective == "entropy" else None
    rows = [(example, answer) for example in examples for answer in example.answers[:count]]
    values: list[torch.Tensor] = []  # of each row: log-probability of the answer's tokens, or entropies, float64 [n]
    for batch in _batches(rows):
        tokens = [(*example.context, *answer)[:-1] for example, answer in batch]
        ids = torch.zeros(len(batch), max(map(len, tokens)), dtype=torch.int64)  # padded on the right: never looked at
        for row, sequence in zip(ids, tokens, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        for row, (example, answer) in zip(logits, batch, strict=True):
            first = len(example.context) - 1
            predicted = row[first : first + len(answer)].double().log_softmax(dim=-1)  # [n, vocab]
            if objective == "entropy":
                predicted = predicted if is_text else predicted[:1]
                values.append(-(predicted.exp() * predicted).sum(dim=-1))
            else:
                values.append(predicted[torch.arange(len(answer)), torch.tensor(answer)])
    if objective == "entropy":
        return Score(0.0, float(torch.cat(values).mean()))
    if is_text:
        return Score(0.0, -float(torch.cat(values).mean()))
    totals = iter([float(value.sum()) for value in values])
    losses, wrong = [], 0
    for example in examples:
        chances = torch.tensor([next(totals) for _ in example.answers], dtype=torch.float64)
        wrong += int(chances.argmax()) != 0
        losses.append(float(-chances.log_softmax(dim=0)[0]))
    return Score(wrong / len(examples), math.fsum(losses) / len(losses))


Row = tuple[Example, tuple[int, ...]]


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Group neighbouring rows of at most `BATCH_TOKENS` tokens, padding included; a longer row runs alone."""
    batch: list[Row] = []
    longest = 0
    for example, answer in rows:
        length = len(example.context) + len(answer) - 1
        if batch and max(longest, length) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], 0
        batch.append((example, answer))
        longest = max(longest, length)
    yield batch


def tune(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    unit: str = UNITS[0],
    objective: str = OBJECTIVES[0],
    report: Report = silent,
) -> TuneResult:
    """Find factors for `loaded`, a model in float32. The same input gives the same factors.

    unit: ``head | layer``, what is profiled by itself. objective: ``labels``, or ``entropy`` of the predictions, which
    needs no labels (the paper's unsupervised variant).
    report: called with the stages ``profile`` and ``search``.

    Raises: UsageError if an example is longer than the model knows positions, or for a model that cannot be followed.
    """
    config = loaded.model.config.get_text_config()
    _check_lengths(examples, getattr(config, "max_position_embeddings", None))
    shape = (int(config.num_hidden_layers), int(config.num_attention_heads))
    scale = torch.ones(shape, dtype=torch.float64)
    chosen, held_out = examples[::2], examples[1::2]
    with first_token_scaled(loaded.model, scale) as sliding:
        before, held_out_before = (score(loaded.model, part, objective) for part in (chosen, held_out))
        # Layers with a sliding window may keep no sinks: they stay as they are.
        layers = [layer for layer in range(shape[0]) if layer not in sliding]
        found, after = _Search(loaded.model, scale, chosen, objective, report).run(unit, layers, before)
        scale.copy_(found)
        held_out_after = score(loaded.model, held_out, objective)
    file = SinkTuningFile(
        model=TunedModel(
            name=loaded.name, architecture=type(loaded.model).__name__, num_layers=shape[0], num_q_heads=shape[1]
        ),
        found=f"tune by {unit}, {objective}, {len(chosen)} examples: loss {before.loss:.5f} -> {after.loss:.5f}; "
        f"{len(held_out)} held out: {held_out_before.loss:.5f} -> {held_out_after.loss:.5f}",
        first_token_scale=tuple(tuple(round(float(x), 6) for x in layer) for layer in found),
    )
    kind = "texts" if len(examples[0].answers) == 1 else "questions"
    return TuneResult(file, kind, objective, len(chosen), len(held_out), before, after, held_out_before, held_out_after)


class _Search:
    """Tries factors: they are in `scale` [L, Hq] while they are tried, and 1 afterwards."""

    def __init__(
        self, model: Any, scale: torch.Tensor, examples: Sequence[Example], objective: str, report: Report
    ) -> None:
        self._model, self._scale, self._examples = model, scale, examples
        self._objective, self._report = objective, report

    def run(self, unit: str, layers: Sequence[int], before: Score) -> tuple[torch.Tensor, Score]:
        """Find the best factors float64 [L, Hq] and their score; all 1 if none is better than `before`."""
        units = self._units(unit, layers)
        probed = []
        for done, one in enumerate(units):
            self._report("profile", done, len(units))
            probed.append(self._tried(torch.where(one, PROBE, 1.0)))
        self._report("profile", len(units), len(units))
        order = sorted(range(len(units)), key=lambda i: (probed[i], i))
        gains = [i for i in order if probed[i] < before]
        losses = [i for i in reversed(order) if probed[i] > before]
        best = [(before, torch.ones_like(self._scale))]
        done, total = 0, (len(LARGER) + len(SMALLER)) * len(SHARES) + 1
        for sensitive, factors in ((gains, LARGER), (losses, SMALLER)):
            candidates = [best[0]]
            for factor in factors:
                for share in SHARES:
                    self._report("search", done, total)
                    done += 1
                    members = sensitive[: math.ceil(share * len(sensitive))]
                    if members:
                        mask = torch.stack([units[i] for i in members]).any(dim=0)
                        tried = torch.where(mask, factor, 1.0).double()
                        candidates.append((self._tried(tried), tried))
            best.append(min(candidates, key=lambda pair: pair[0]))
        both = best[1][1] * best[2][1]
        best.append((self._tried(both), both))
        self._report("search", total, total)
        after, found = min(best, key=lambda pair: pair[0])
        return found, after

    def _units(self, unit: str, layers: Sequence[int]) -> list[torch.Tensor]:
        """List what is profiled by itself, as masks: bool [L, Hq] each."""
        num_layers, num_heads = self._scale.shape
        layer, head = torch.arange(num_layers)[:, None], torch.arange(num_heads)
        if unit == "layer":
            return [(layer == i).expand(-1, num_heads) for i in layers]
        return [(layer == i) & (head == j) for i in layers for j in range(num_heads)]

    def _tried(self, factors: torch.Tensor) -> Score:
        self._scale.copy_(factors)
        try:
            return score(self._model, self._examples, self._objective)
        finally:
            self._scale.fill_(1.0)


def _check_lengths(examples: Sequence[Example], limit: int | None) -> None:
    for example in examples:
        longest = len(example.context) + max(map(len, example.answers))
        if limit is not None and longest > limit:
            raise UsageError(
                problem(
                    f"--labelled, line {example.number}",
                    received=f"{longest:,} tokens",
                    expected=f"at most {limit:,}, the model's positions",
                    fix="shorten it",
                )
            )
