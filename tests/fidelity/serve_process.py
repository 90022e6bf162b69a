"""A server in a process of its own, with short times: ``python -m tests.fidelity.serve_process BUNDLE JSON``.

JSON: fields of `Limits`, and "key" and "files" (the most file descriptors that may be open). Prints its port.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx


class Process:
    """A running server and its log so far."""

    def __init__(self, bundle: Path, options: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(bundle), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.process.stdout.readline() or "0")
        assert self.port, self.log
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def connect(self, buffer: int | None = None) -> socket.socket:
        """A connection that has said nothing. buffer: bytes that its own kernel takes unread."""
        raw = socket.socket()
        raw.settimeout(20)
        if buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        raw.connect(("127.0.0.1", self.port))
        return raw

    def ask(self, data: bytes) -> tuple[int, bytes]:
        """Send bytes and read to the end of the connection: status and all that came."""
        with self.connect() as raw:
            with contextlib.suppress(OSError):  # refused while it was being sent
                raw.sendall(data)
            got = read_all(raw)
        return (int(got.split(b" ", 2)[1]) if got.startswith(b"HTTP/1.1 ") else 0), got

    def wait_healthy(self, seconds: float = 15) -> httpx.Response:
        """The first answer of /health to a client that tries again, as real ones do."""
        end = time.monotonic() + seconds
        while True:
            try:
                return httpx.get(f"{self.url}/health", timeout=2)
            except httpx.TransportError:
                assert time.monotonic() < end, self.log

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)


def read_all(raw: socket.socket) -> bytes:
    """All bytes up to the end of a connection, also one that was reset."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := raw.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def serving_process(bundle: Path, **options: Any) -> Iterator[Process]:
    process = Process(bundle, options)
    try:
        yield process
    finally:
        process.end()


def main() -> None:
    from sinkexport.serve.server import Server
    from sinkexport.serve.settings import Limits, listen
    from sinkrt import Session

    options = json.loads(sys.argv[2])
    key, files, send_buffer = (options.pop(name, None) for name in ("key", "files", "send_buffer"))
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    with listen("127.0.0.1", 0) as listener, Session.load(Path(sys.argv[1]), threads=1) as session:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        server = Server(session, Limits(**options), api_keys=None if key is None else {"default": key})
        print(listener.getsockname()[1], flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal once more in the end
            server.run(listener)


if __name__ == "__main__":
    main()
