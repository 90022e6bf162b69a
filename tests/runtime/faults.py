"""Backends that fail when a test wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from sinkrt import Session
from sinkrt.backends import LOADERS
from sinkrt.backends.base import Backend


class FaultyBackend:
    """A backend whose parts a test may replace: ``faulty.run = fail``, and ``del faulty.run`` mends it.

    real: the backend behind it.
    """

    def __init__(self, real: Backend) -> None:
        self.real: Any = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def load_faulty(bundle: Path) -> tuple[Session, Any]:
    """A session on the CPU, with one thread, and its `FaultyBackend`."""
    loader, made = LOADERS["ort"], []

    def load(*arguments: Any) -> Any:
        made.append(FaultyBackend(loader(*arguments)))
        return made[0]

    with mock.patch.dict(LOADERS, ort=load):
        session = Session.load(bundle, threads=1)
    return session, made[0]
