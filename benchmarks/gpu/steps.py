"""Steps of `e2e.py`: programs with a time limit each, a log each, and facts that are kept at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STUB = 'extern "C" bool initLibNvInferPlugins(void*, const char*) { return true; }\n'


class StepError(Exception):
    """A step did not do what it should; the line says why."""


class Bench:
    """Runs steps and keeps what they found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out, self.work = arguments.out.absolute(), arguments.work.absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {}
        self.running: set[subprocess.Popen[bytes]] = set()
        self.started = time.monotonic()
        self.environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
        if arguments.tensorrt is not None:
            folder = arguments.tensorrt.absolute()
            libraries = [str(folder)]
            if not list(folder.glob("libnvinfer_plugin.so*")):  # the parser is linked with it, and needs nothing of it
                libraries.append(str(self._stub()))
            libraries += filter(None, [os.environ.get("LD_LIBRARY_PATH")])
            self.environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)

    def left(self) -> float:
        """Seconds that are left of --seconds."""
        return self.arguments.seconds - (time.monotonic() - self.started)

    def run(self, name: str, command: Sequence[Any], limit_s: float, *, gpu_environment: bool = True) -> str:
        """Run a program; its output goes to OUT/NAME.log.

        Returns its standard output. Raises: StepError.
        """
        limit = min(limit_s, self.left())
        if limit < 5:
            raise StepError("no time left")
        log = self.out / f"{name.replace(' ', '-')}.log"
        start = time.monotonic()
        with log.open("ab") as file:
            file.write(f"$ {' '.join(map(str, command))}\n".encode())
            file.flush()
            process = subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
                env=self.environment if gpu_environment else None,
            )
            self.running.add(process)
            try:
                out, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, _ = process.communicate()
                file.write(out)
                raise StepError(f"more than {limit:.0f} s") from None
            finally:
                self.running.discard(process)
            file.write(out)
        print(
            f"[{time.monotonic() - self.started:5.0f} s] {name}: {time.monotonic() - start:.1f} s, "
            f"exit code {process.returncode}",
            flush=True,
        )
        if process.returncode != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise StepError(f"exit code {process.returncode}: {lines[-1][:300]}")
        return out.decode(errors="replace")

    def stop(self) -> None:
        """End what is still running: exports that came too late."""
        for process in tuple(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def found(self, name: str, **facts: Any) -> None:
        """Keep facts of a step, on disk at once."""
        self.results.setdefault(name, {}).update(facts)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        print(f"[{time.monotonic() - self.started:5.0f} s] {name}: {json.dumps(facts)[:600]}", flush=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Any:
        """A failure is a fact, too."""
        try:
            yield
        except Exception as error:
            self.found(name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def probe(self, name: str, *words: Any, limit_s: float = 120) -> dict[str, Any]:
        """The last line of a probe's output, as JSON."""
        out = self.run(name, [self.arguments.tools / "probe", *words], limit_s)
        answer: dict[str, Any] = json.loads(out.strip().split("\n")[-1])
        return answer

    def build(self, name: str, bundle: Path, limit_s: float) -> None:
        """Engines of a bundle, unless it has them already."""
        if json.loads((bundle / "manifest.json").read_text())["engines"]:
            return
        command = [self.tool("sinkrt_build"), bundle, "--plugin", self.arguments.plugin]
        if self.arguments.tactic_sources is not None:
            command += ["--tactic-sources", self.arguments.tactic_sources]
        start = time.monotonic()
        self.run(f"build {name}", command, limit_s)
        self.found(name, build_s=round(time.monotonic() - start, 1))

    def tool(self, name: str) -> Path:
        """Path of a built program.

        Raises: StepError.
        """
        for place in (self.arguments.tools / name, self.arguments.tools / "sinkrt" / name):
            if place.is_file():
                return place
        raise StepError(f"no '{name}' in --tools")

    def _stub(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="stub-"))
        (folder / "stub.cpp").write_text(STUB)
        library = folder / "libnvinfer_plugin.so.8"
        subprocess.run(["g++", "-shared", "-fPIC", "-o", library, folder / "stub.cpp"], check=True)
        return folder
