"""The merges of a BPE vocabulary: those that a file lists, and those that the scores of SentencePiece stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from sinkrt.errors import UsageError

from sinkexport.loading.tokenizers.gguf_vocab import FOLDER, TokenType, Vocabulary, refused

Pair = tuple[str, str]

_LONGEST_RUN = 40
"""Longest runs with one score that are tried: for longer ones the trial takes too long."""


def listed_merges(lines: Iterable[str], ids: Mapping[str, int]) -> list[Pair]:
    """The merges of ``tokenizer.ggml.merges`` in their order, each once; those that can never come about are left out.

    Raises: UsageError for a merge that can come about and makes no token.
    """
    pairs: dict[Pair, None] = {}
    for line in lines:
        cut = line.find(" ", 1)
        if cut > 0:
            pairs.setdefault((line[:cut], line[cut + 1 :]))
    made = {first + second for first, second in pairs}
    out = []
    for pair in pairs:
        first, second = pair
        if first in ids and second in ids and first + second in ids:
            out.append(pair)
        elif all(len(part) == 1 or part in made for part in pair):
            raise refused(f"a merge of {first!r} and {second!r} that makes no token", "merges between tokens")
    return out


def scored_merges(vocabulary: Vocabulary) -> list[Pair]:
    """The merges that give what SentencePiece's BPE gives: of all neighbours that make a token the pair with the
    highest score goes first, the leftmost of equal ones.

    `tokenizers` wants one order of all pairs. Pairs of different tokens with one score can meet in a text, if the
    second part of one is the first part of the other. They are put in the order in which the leftmost goes first.

    Raises: UsageError if there are no scores, if there is no such order, and for a token made of a character that is
    none: there a merge would begin with what has no id.
    """
    ids, scores = vocabulary.ids, vocabulary.scores
    if not scores:
        raise refused("a SentencePiece vocabulary without tokenizer.ggml.scores", "scores, which order the merges")
    splits = _splits(vocabulary)
    by_score: dict[float, list[Pair]] = {}
    for text, pairs in splits.items():
        by_score.setdefault(scores[ids[text]], []).extend(pairs)
    out: list[Pair] = []
    uses = _Uses()
    for score in sorted(by_score, reverse=True):
        pairs = by_score[score]
        uses.add(pairs)
        tokens = {first + second for first, second in pairs}
        if len(tokens) == 1:
            out += pairs
        elif len({character for text in tokens for character in text}) == 1:
            out += _runs(pairs)
        else:
            _refuse_chains(pairs, uses)
            out += _leftmost_first(pairs)
    return out


def _splits(vocabulary: Vocabulary) -> dict[str, list[Pair]]:
    """Token -> the pairs that make it, of tokens that can come about themselves.

    Control tokens and those for bytes never come from text, as with SentencePiece. llama.cpp lets text become control
    tokens, where merges lead to one. What users defined is cut out of a text before, unless it has a ``▁`` that is a
    space in the text.
    """
    ids, types = vocabulary.ids, vocabulary.types
    plain = (TokenType.NORMAL, TokenType.UNUSED)
    made = (
        text
        for text, index in ids.items()
        if types[index] in plain or (types[index] == TokenType.USER_DEFINED and "▁" in text)
    )
    out: dict[str, list[Pair]] = {}
    for text in sorted((text for text in made if len(text) > 1), key=len):
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in pairs if all(len(part) == 1 or part in out for part in pair)]
        for part in (part for pair in pairs for part in pair):
            if part not in ids:
                raise refused(f"the token {text!r} and none for {part!r}", "a token for each character of a token")
        if pairs:
            out[text] = pairs
    return out


def _leftmost_first(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of one score, ordered so that of two that share a neighbour the left one comes first."""
    by_second: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_second.setdefault(pair[1], []).append(pair)
    before = {pair: [left for left in by_second.get(pair[0], ()) if "".join(left) != "".join(pair)] for pair in pairs}
    try:
        return list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise _unordered("".join(pair) for pair in error.args[1]) from error


class _Uses:
    """Neighbours that tokens are merged with, by the pairs added so far; indexed on demand, which is rare."""

    def __init__(self) -> None:
        self._waiting: list[Sequence[Pair]] = []
        self._of: dict[str, list[Pair]] = {}

    def add(self, pairs: Sequence[Pair]) -> None:
        """Add pairs."""
        self._waiting.append(pairs)

    def of(self, part: str) -> Sequence[Pair]:
        """Each neighbour that makes a token with `part`, and the token."""
        for first, second in (pair for pairs in self._waiting for pair in pairs):
            self._of.setdefault(first, []).append((second, first + second))
            self._of.setdefault(second, []).append((first, first + second))
        self._waiting.clear()
        return self._of.get(part, ())


def _refuse_chains(pairs: Sequence[Pair], uses: _Uses) -> None:
    """Refuse pairs of one score if one leads to merges that take a part of another away, or add to it.

    uses: of the pairs that go before or among these.
    """
    parts: dict[str, set[str]] = {}  # of the pairs -> the tokens that they make
    for pair in pairs:
        for part in pair:
            parts.setdefault(part, set()).add("".join(pair))
    for start in {"".join(pair) for pair in pairs}:
        reached, open_ = {start}, [start]
        while open_:
            for other, token in uses.of(open_.pop()):
                if parts.get(other, set()) - {start}:
                    raise _unordered([start])
                if token not in reached:
                    reached.add(token)
                    open_.append(token)


def _runs(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of one score that are all runs of one character, such as Llama 2's runs of spaces.

    The leftmost first means: one run from the left until it is as long as a token can be, then the next. Doubling does
    so too, if the lengths allow for it, which is tried out.
    """
    sizes = [(len(first), len(second)) for first, second in pairs]
    if max(map(sum, sizes)) > _LONGEST_RUN:
        raise _unordered(first + second for first, second in pairs)
    order = sorted(sizes, key=lambda size: (0, size[0]) if size[0] == size[1] else (1, -size[0], -size[1]))
    ranks = {size: rank for rank, size in enumerate(order)}
    for count in range(2, 4 * max(map(sum, sizes)) + 2):
        if _merged([1] * count, lambda left, right: ranks.get((left, right))) != _merged(
            [1] * count, lambda left, right: 0 if (left, right) in ranks else None
        ):
            raise _unordered(first + second for first, second in pairs)
    character = pairs[0][0][0]
    return [(character * first, character * second) for first, second in order]


def _merged(sizes: list[int], rank: Callable[[int, int], int | None]) -> list[int]:
    """Lengths of runs after merging neighbours: the lowest rank first, the leftmost of equal ones."""
    while True:
        found = [(order, at) for at, pair in enumerate(pairwise(sizes)) if (order := rank(*pair)) is not None]
        if not found:
            return sizes
        at = min(found)[1]
        sizes = [*sizes[:at], sizes[at] + sizes[at + 1], *sizes[at + 2 :]]


def _unordered(tokens: Iterable[str]) -> UsageError:
    some = ", ".join(repr(text) for text in dict.fromkeys(tokens))
    return refused(
        f"tokens with one score whose order depends on the text ({some[:80]})", "a score of its own for each", FOLDER
    )
