"""Write the file of an engine while TensorRT builds it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sinkrt.backends.tensorrt_library import one_line
from sinkrt.errors import UsageError, problem
from sinkrt.files import replacing


@contextlib.contextmanager
def replacing_engine(target: Path | None) -> Iterator[IO[bytes] | None]:
    """Open a temporary file that becomes `target` when the block succeeds, and vanishes otherwise (Ctrl-C included).

    Raises: UsageError if it cannot be written.
    """
    if target is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a full disk shows at write, not at close.
            file = stack.enter_context(replacing(target, buffering=0))
        except OSError as error:
            raise _write_failure(error) from None
        yield file


def write_engine(trt: Any, builder: Any, network: Any, config: Any, file: IO[bytes] | None) -> int:
    """Build and write the engine. Returns: its bytes; 0: it failed, and the log says why.

    Raises: UsageError if the file cannot be written.
    """
    if hasattr(builder, "build_serialized_network_to_stream"):
        writer = _make_writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise _write_failure(writer.error)
        return int(writer.num_bytes) if built else 0
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return 0
    rest = memoryview(plan)
    try:
        while file is not None and rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise _write_failure(error) from None
    return memoryview(plan).nbytes


def _write_failure(error: OSError) -> UsageError:
    return UsageError(
        problem(
            "engine file",
            received=one_line(str(error)),
            expected="a writable place with enough room",
            fix="free some space or choose another path",
        )
    )


def _make_writer(trt: Any, file: IO[bytes] | None) -> Any:
    # A class in a function: its base exists only once the package is imported.
    class Writer(trt.IStreamWriter):
        """Counts the engine's bytes and passes them on to `file`, if any."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.num_bytes = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            rest = memoryview(data)
            try:
                while file is not None and rest:
                    rest = rest[file.write(rest) :]  # an unbuffered file may take only a part
            except OSError as error:  # must not pass through native code
                self.error = error
                return 0
            self.num_bytes += len(data)
            return len(data)

    return Writer()
