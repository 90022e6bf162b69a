"""What tests of several folders share: exports of tiny models, the command line, ids, refusals.

Nothing here imports torch until an export asks for it: tests of the runtime need none.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar
from unittest import mock

import numpy as np
import pytest

if TYPE_CHECKING:
    from sinkexport.config import ExportConfig
    from sinkexport.sources import LoadedModel
    from sinkrt import Session
    from sinkrt.contract import Manifest

Built = TypeVar("Built")

VOCAB_SIZE = 97
"""Tokens that the exporter's tiny models know."""
FIRST_ID = 3
"""The tiny models' ids below it are special."""
COMMAND = (sys.executable, "-m", "sinkexport.cli")
ERROR = "sinkexport: error: "


# --- ids -------------------------------------------------------------------------------------------------------------


def random_ids(*shape: int, seed: int = 0, vocab_size: int = VOCAB_SIZE, first: int = FIRST_ID) -> np.ndarray:
    """int64 ids `first` .. `vocab_size` - 1."""
    return np.random.default_rng(seed).integers(first, vocab_size, shape)


# --- the command line ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def succeeded(self) -> Result:
        """Assert exit code 0."""
        assert self.code == 0, self
        return self

    def refusal(self, *expected: str, code: int = 2) -> str:
        """Assert an error of one line that has every text of `expected` in it; return the line's message."""
        assert self.code == code, self
        assert self.err.startswith(ERROR), self.err
        assert self.err.count("\n") == 1, self.err
        message = self.err.removeprefix(ERROR).rstrip("\n")
        for text in expected:
            assert text in message, message
        return message


def run_cli(*arguments: object, stdin: bytes | str | TextIO = b"") -> Result:
    """`sinkexport` in this process, from its entry point to its exit code. stdin: what it holds, or an open file."""
    from sinkexport.cli import main

    with contextlib.ExitStack() as stack:
        streams = {name: stack.enter_context(_stream()) for name in ("stdin", "stdout", "stderr")}
        if isinstance(stdin, (bytes, str)):
            streams["stdin"].buffer.write(stdin if isinstance(stdin, bytes) else stdin.encode())
            streams["stdin"].seek(0)
        else:
            streams["stdin"] = stdin
        stack.enter_context(mock.patch.multiple(sys, argv=["sinkexport", *map(str, arguments)], **streams))
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *(_written(streams[name]) for name in ("stdout", "stderr")))


def run_cli_apart(*arguments: object, stdin: bytes | str = b"", **options: Any) -> Result:
    """`sinkexport` in a process of its own: for signals, closed descriptors, and what it imports."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin if isinstance(stdin, bytes) else stdin.encode(),
        capture_output=True,
        timeout=120,
        check=False,
        **options,
    )
    return Result(done.returncode, done.stdout.decode(errors="surrogateescape"), done.stderr.decode())


def _stream() -> Any:
    """A file with a descriptor, as a process's own streams have."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", newline="")


def _written(stream: Any) -> str:
    stream.flush()
    stream.seek(0)
    text: str = stream.read()
    return text


# --- refusals --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(*expected: str, error: type[Exception] | None = None) -> Iterator[None]:
    """Expect an error of one line that has every text of `expected` in it. error: its class, SinkError by default."""
    from sinkrt.errors import SinkError

    with pytest.raises(error or SinkError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message, message
    for text in expected:
        assert text in message, message


# --- what runs each day and what each night ---------------------------------------------------------------------------


def nightly_but(daily: Iterable[object], cases: Iterable[object]) -> list[Any]:
    """Parameters of a test: those in `daily` are of the usual run, the others of ``make test-nightly``.

    For cases that repeat a mechanism, such as one family after the other: `daily` has one case for each mechanism.
    """
    listed, found = list(daily), list(cases)
    assert all(case in found for case in listed), [case for case in listed if case not in found]
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in listed else pytest.mark.nightly
        )
        for case in found
    ]


# --- exports of tiny models ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TinyBundle:
    """An exported model. Equal exports may share the folder: a test that writes to it makes one of its own."""

    path: Path
    loaded: LoadedModel
    manifest: Manifest

    @property
    def model(self) -> Any:
        return self.loaded.model

    def session(self) -> Session:
        """A session of one thread: idle ones would only spin against torch's."""
        from sinkrt import Session

        return Session.load(self.path, threads=1)


def export_model(
    model: Any,
    folder: Path,
    config: ExportConfig | None = None,
    *,
    tokenizer: Any = None,
    name: str = "tiny",
    check: bool = True,
    **fields: Any,
) -> TinyBundle:
    """Export a model, or a tiny one by its name, to `folder`, for target onnx by default.

    fields: of ExportConfig, where there is no `config`.
    """
    from sinkexport.config import ExportConfig
    from sinkexport.pipeline.export import export_loaded
    from sinkexport.sources import LoadedModel

    from tests.exporter.tiny_models import tiny_model

    loaded = LoadedModel(tiny_model(model) if isinstance(model, str) else model, tokenizer, name)
    config = config or ExportConfig(**{"target": "onnx", **fields})
    return TinyBundle(folder, loaded, export_loaded(loaded, folder, config, check=check))


class SharedExports:
    """Exports of tiny models that tests only read: each is made once a run, whichever worker needs it first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, model: str | functools.partial[Any], *, tokenizer: bool = False, **config: Any) -> TinyBundle:
        """A model of tiny_models by its name, or what a function of a module makes, exported with these fields of
        ExportConfig. tokenizer: with that of tiny_models.
        """
        from sinkexport.sources import LoadedModel

        from tests.exporter.tiny_models import tiny_model, tiny_tokenizer

        key = hashlib.sha256(pickle.dumps((model, tokenizer, sorted(config.items())))).hexdigest()[:20]
        loaded = LoadedModel(
            tiny_model(model) if isinstance(model, str) else model(), tiny_tokenizer() if tokenizer else None, "tiny"
        )

        def export(folder: Path) -> Manifest:
            return export_model(loaded.model, folder / "bundle", tokenizer=loaded.tokenizer, **config).manifest

        manifest = built_once(self._folder / key, export)
        return TinyBundle(self._folder / key / "bundle", loaded, manifest)


def built_once(folder: Path, build: Callable[[Path], Built]) -> Built:
    """What `build` makes in a folder of its own, however many workers ask for it: the others read what it returned."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "built.pickle"
        if not done.exists():
            done.write_bytes(pickle.dumps(build(folder)))
        built: Built = pickle.loads(done.read_bytes())
        return built


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers of a run have."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def read_operators_once() -> None:
    """Let torch read the sources of its translations and its list of operators once a process, and not in every export.

    That is 0.7 s of a tiny export and of a real one alike. `torch.onnx.export` takes no registry, so this replaces
    functions of torch's private modules: the one such place, which `tests/test_habits.py` lets pass.
    """
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration

    utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)

    read = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def from_torchlib(*version: int, **named: int) -> Any:
        registry = copy.copy(read(*version, **named))
        # An export adds its own translations.
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    _registration.ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
