"""The decoders' processes, seen from the benchmark that drives them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WITH_PEER_PYTHON = {"genai", "openvino"}


def kind_of(name: str) -> str:
    """The key of `baselines.DECODERS` in a name such as ``genai:int4``; variants follow the colon."""
    return name.partition(":")[0]


class DecoderError(Exception):
    """The error message of a decoder that could not go on."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """ms: one time a call. tokens: chosen by them, as far as the decoder reports them. peak_mb: most memory the process
    has had resident so far.
    """

    ms: list[float]
    tokens: list[int]
    peak_mb: float


class Worker:
    """A decoder's process."""

    def __init__(self, name: str, path: Path, *, python: str, threads: int, capacity: int, sinks: int) -> None:
        self.name = name
        command = [python, str(HERE / "worker_process.py"), kind_of(name), str(path), f"--threads={threads}"]
        self._process = subprocess.Popen(
            [*command, f"--capacity={capacity}", f"--sinks={sinks}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.packages: dict[str, str] = self._reply()["packages"]

    def prefill(self, ids: list[int], limit: int) -> Reply:
        """Start a stream that will have at most `limit` tokens.

        Raises: DecoderError.
        """
        return Reply(**self._ask(op="prefill", ids=ids, limit=limit))

    def steps(self, count: int) -> Reply:
        """`count` steps.

        Raises: DecoderError.
        """
        return Reply(**self._ask(op="steps", count=count))

    def close(self) -> None:
        """Let the process end; kill it if it does not."""
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._reply()
        if "error" in answer:
            raise DecoderError(answer["error"])
        return answer

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with exit code {self._process.wait()}; see above")
        return dict(json.loads(line))


def packages(workers: list[Worker]) -> dict[str, str]:
    """Versions of packages in all their environments."""
    return {name: version for worker in workers for name, version in worker.packages.items()}


@contextlib.contextmanager
def running(
    paths: Mapping[str, Path], peer_python: str, *, threads: int, capacity: int, sinks: int
) -> Iterator[list[Worker]]:
    """Start a process for each decoder; yield them loaded and waiting. paths: name -> its model."""
    workers: list[Worker] = []
    try:
        for name, path in paths.items():
            print(f"loading {name}", file=sys.stderr)
            python = peer_python if kind_of(name) in WITH_PEER_PYTHON else sys.executable
            workers.append(Worker(name, path, python=python, threads=threads, capacity=capacity, sinks=sinks))
        yield workers
    finally:
        for worker in workers:
            worker.close()
