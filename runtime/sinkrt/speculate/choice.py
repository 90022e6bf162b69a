"""The choice of a drafter: ``ngram``, or ``draft:DIR`` for another bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sinkrt.errors import UsageError, problem
from sinkrt.speculate.draft_model import DraftModel
from sinkrt.speculate.drafter import Drafter
from sinkrt.speculate.ngram import NgramDrafter
from sinkrt.speculate.sessions import BundleSession, DraftSession
from sinkrt.speculate.tally import Tally

NGRAM = "ngram"
DRAFT = "draft:"


@dataclasses.dataclass
class Speculation:
    """One drafter at work, and what has come of it. most: K, tokens that a guess may have."""

    drafter: Drafter
    most: int
    tally: Tally = dataclasses.field(default_factory=Tally)


def load_speculation(session: BundleSession, wanted: str, open_bundle: Callable[[Path], DraftSession]) -> Speculation:
    """Open what `wanted` names, for the one stream of `session`. open_bundle: opens another bundle's folder.

    Raises: UsageError for another name, a bundle that cannot verify, or a draft bundle that does not fit;
        BundleError, BackendError if that cannot be opened.
    """
    if not isinstance(wanted, str):
        raise UsageError(problem("speculate", received=wanted, expected="ngram or draft:DIR", fix="choose one of them"))
    if session.num_drafts:
        if wanted == NGRAM:
            return Speculation(NgramDrafter(), session.num_drafts)
        if wanted.startswith(DRAFT) and len(wanted) > len(DRAFT):
            folder = Path(wanted.removeprefix(DRAFT))
            return Speculation(DraftModel.of(session, open_bundle(folder)), session.num_drafts)
    elif wanted == NGRAM or wanted.startswith(DRAFT):
        raise UsageError(
            problem(
                "speculate",
                received="a bundle without a graph that verifies drafts",
                expected="a bundle exported with --speculate K",
                fix="export the model again with --speculate 10",
            )
        )
    raise UsageError(
        problem("speculate", received=f"'{wanted}'", expected="ngram or draft:DIR", fix="choose one of them")
    )
