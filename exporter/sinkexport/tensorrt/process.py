"""Build an engine in a process of its own: TensorRT is native code whose crash must not end this process.

The child reads its task as JSON from stdin and answers with one JSON line; what native code prints goes to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from sinkrt.errors import BackendError, SinkError, UsageError, problem

from sinkexport.tensorrt.builder import build_engine
from sinkexport.tensorrt.options import MODULE, BuildOptions, EngineReport

MAX_SHOWN_LINES = 3
RTX_LIBRARY = "libtensorrt_rtx.so"


class EngineBuildError(Exception):
    """TensorRT crashed, or refused a graph that was made for it. One line, for exit code 1."""


def build_engine_apart(
    graph: Path, engine: Path, options: BuildOptions, *, debug: bool = False, command: tuple[str, ...] = ()
) -> EngineReport:
    """Run `build_engine` in a child process.

    debug: let the child's stderr, its traceback included, through. command: what to run instead of this module.

    Raises: UsageError, BackendError as the child does; EngineBuildError if it died.
    """
    task = {"graph": str(graph), "engine": str(engine), **{k: _plain(v) for k, v in vars(options).items()}}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(  # noqa: S603 - this very module
            command or (sys.executable, "-m", __name__),
            input=json.dumps(task),
            capture_output=True,
            text=True,
            check=False,
            env=_environment(Path(folder)),
        )
    if debug and done.stderr:
        sys.stderr.write(done.stderr)
    try:
        answer = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
    except ValueError:
        answer = None
    if done.returncode == 0 and answer is not None and "report" in answer:
        return _report(answer["report"])
    if answer is not None and "error" in answer:
        raise {"UsageError": UsageError, "BackendError": BackendError}.get(answer["kind"], EngineBuildError)(
            answer["error"]
        )
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    said = " / ".join(line.strip() for line in done.stderr.splitlines()[-MAX_SHOWN_LINES:]) or "no message"
    raise EngineBuildError(
        problem(
            f"engine of '{graph.name}'",
            received=f"a crash of TensorRT ({how}; {said})",
            expected="a build that ends",
            fix="run with --debug, and report it with the graph",
        )
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _environment(folder: Path) -> dict[str, str]:
    """Link TensorRT-RTX's library to the name under which its parser opens it. Returns: the child's environment."""
    from importlib.util import find_spec

    found = find_spec("tensorrt_rtx_libs")
    if found is None or not found.submodule_search_locations:
        return dict(os.environ)
    library = next(Path(found.submodule_search_locations[0]).glob(f"{RTX_LIBRARY}*"), None)
    if library is None:
        return dict(os.environ)
    (folder / RTX_LIBRARY).symlink_to(library)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _report(raw: dict[str, Any]) -> EngineReport:
    pairs = tuple((before, after) for before, after in raw.pop("in_place"))
    raw.update({key: tuple(raw[key]) for key in ("inputs", "outputs", "warnings")})
    return EngineReport(**raw, in_place=pairs)


def _main() -> int:
    task = json.loads(sys.stdin.read())
    # Native code and Python's own prints must not get between the JSON lines.
    answer = os.dup(1)
    os.dup2(2, 1)
    graph, engine = Path(task.pop("graph")), Path(task.pop("engine"))
    for key in ("plugin", "timing_cache"):
        task[key] = None if task[key] is None else Path(task[key])
    options = BuildOptions(**{**task, "modules": tuple(task.get("modules", (MODULE,)))})
    try:
        result: dict[str, Any] = {"report": dataclasses.asdict(build_engine(graph, engine, options))}
    except SinkError as error:
        traceback.print_exc()
        result = {"error": str(error), "kind": type(error).__name__}
    with os.fdopen(answer, "w", encoding="utf-8") as out:
        out.write(json.dumps(result) + "\n")
    return 0 if "report" in result else 1


if __name__ == "__main__":
    sys.exit(_main())
