"""The process that renders a chat template: started on first use, ended when it takes too long."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from sinkrt.errors import UsageError, problem

TIME_LIMIT_S = 10.0
"""Longest time for one request to the process."""
MAX_RESPONSE_BYTES = 2**29
KEPT_ENVIRONMENT = ("TZ", "TZDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Environment variables that the process gets: enough to start Python and to know the time, and no keys."""
LEAST_JINJA = (3, 1, 6)
"""Older versions have known ways out of the sandbox (CVE-2024-56326, CVE-2025-27516)."""


class TemplateFailure(Exception):  # noqa: N818 - the caller words the error
    """A template failed as a whole; its text is the reason, in one line."""


class TemplateProcess:
    """Renderer of one template. Any thread may call it; one at a time gets its turn.

    source: Jinja. time_limit_s: of one call, compilation included.
    """

    def __init__(self, source: str, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._source = source
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._facts: dict[str, Any] = {}
        self._end: weakref.finalize[Any, TemplateProcess] | None = None

    def facts(self) -> dict[str, Any]:
        """Facts by name. ``variables``: names that the template reads. ``literals``: text that it writes by itself.

        Raises: TemplateFailure, UsageError.
        """
        with self._lock:
            self._started()
            return self._facts

    def render(self, jobs: list[dict[str, Any]], now: float | None = None) -> list[dict[str, str]]:
        """The renderings for some sets of variables, each ``{"text": ..}`` or ``{"error": ..}``.

        now: the time that they show, in seconds since 1970; None for that of the call.

        Raises: TemplateFailure if they took too long or the process has ended; UsageError.
        """
        with self._lock:
            self._started()
            request = {"render": jobs, "now": time.time() if now is None else now}
            renderings: list[dict[str, str]] = self._ask(request)["renderings"]
            return renderings

    def close(self) -> None:
        """End the process, whatever it is at; a later call starts another. Closing twice is fine."""
        if self._end is not None:
            self._end()

    def _started(self) -> None:
        process = self._process
        if process is not None and process.poll() is None and self._owner == os.getpid():
            return
        self.close()
        self._process = process = _start(self._time_limit_s)
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _kill, process, self._owner)
        self._facts = self._ask({"load": self._source})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("the template process has not been started")
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._time_limit_s, give_up)
        timer.daemon = True
        line = b""
        try:
            data = json.dumps(request).encode("ascii") + b"\n"
            timer.start()
            with contextlib.suppress(OSError):  # it has ended: there is no answer either
                process.stdin.write(data)
                process.stdin.flush()
                line = process.stdout.readline(MAX_RESPONSE_BYTES)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateFailure(f"messages or arguments that are no JSON: {error}") from None
        finally:  # an interrupt too: the answer that is still to come belongs to no later request
            timer.cancel()
            if not line.endswith(b"\n"):
                self.close()
        if late.is_set():
            raise TemplateFailure(f"more than {self._time_limit_s:g} s")
        if not line.endswith(b"\n"):
            raise TemplateFailure("the end of the process that renders it")
        response: dict[str, Any] = json.loads(line)
        if "error" in response:
            self.close()
            raise TemplateFailure(response["error"])
        return response


def require_jinja() -> None:
    """Make sure that there is a Jinja whose sandbox holds.

    Raises: UsageError.
    """
    try:
        version = importlib.metadata.version("jinja2")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < LEAST_JINJA:
        least = ".".join(map(str, LEAST_JINJA))
        raise UsageError(
            problem(
                "jinja2",
                received=version,
                expected=f">= {least}, which chat templates need",
                fix=f"pip install 'jinja2>={least}'",
            )
        )


def _start(time_limit_s: float) -> subprocess.Popen[bytes]:
    """Start a process. It gets no modules but Python's and Jinja's, and none of the parent's files.

    Raises: UsageError if this Python cannot start another.
    """
    require_jinja()
    if not sys.executable or getattr(sys, "frozen", False):
        raise UsageError(
            problem(
                "chat template",
                received="a Python inside another program",
                expected="a Python interpreter to render it with",
                fix="feed token ids, or set sys.executable",
            )
        )
    found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    paths = [str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin is not None]
    options = json.dumps({"paths": list(dict.fromkeys(paths)), "cpu_s": int(time_limit_s) + 2})
    script = Path(__file__).with_name("template_worker.py")
    try:
        return subprocess.Popen(  # noqa: S603 - this very interpreter and a file of this package
            [sys.executable, "-I", "-S", "-B", str(script), options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ},
        )
    except OSError as error:
        raise UsageError(
            problem(
                "chat template",
                received=f"no process to render it ({error})",
                expected="a Python interpreter that starts",
                fix="check sys.executable",
            )
        ) from error


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():  # a fork: the process is the parent's
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was written and not taken
                pipe.close()
