"""Parse an ONNX graph with TensorRT-RTX and build its engine, on the CPU: no GPU is needed.

TensorRT-RTX compiles ahead of time for every GPU generation that it supports and finishes the kernels on
the machine that runs them, so an engine can be built, and a graph be proven buildable, where there is no GPU.
Its parser is the one of TensorRT 10 and later. Running the engine is a matter for the runtimes.

How a state is updated is decided here too: TensorRT turns ``TensorScatter(mode=linear, axis=2)`` into a
KVCacheUpdate layer, which writes in place (input and output bound to one buffer) and which it accepts only
from a graph input to a graph output. `EngineReport.in_place` lists those pairs.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sinkrt.errors import BackendError, UsageError, problem

MODULE = "tensorrt_rtx_bindings"
MAX_REPORTED_ERRORS = 8  # one line has to stay readable; the rest is counted


@dataclass(frozen=True)
class EngineReport:
    """What TensorRT-RTX made of one ONNX graph.

    tensorrt: its version. layer_types: layers by type, e.g. ``{"MATRIX_MULTIPLY": 241}``.
    inputs, outputs: names, in the graph's order. in_place: (input, output) names of each state that a
    KVCacheUpdate layer writes in place. warnings: what TensorRT had to say, without repeats.
    parse_s, build_s: seconds. engine_bytes: size of the serialized engine, weights included.
    """

    tensorrt: str
    layer_types: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_place: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    parse_s: float
    build_s: float
    engine_bytes: int

    @property
    def num_layers(self) -> int:
        """Layers of the parsed network, before TensorRT fuses any."""
        return sum(self.layer_types.values())


def build_engine(graph: Path, engine: Path | None = None) -> EngineReport:
    """Parse `graph` and build its engine; keep it at `engine`, or only report on it when that is None.

    graph: an ONNX file; external weights are read from beside it. Shapes must be static.
    The engine is streamed out piece by piece (its file appears only when complete), so that memory holds
    the weights once while TensorRT compiles, and not the finished engine on top.

    Raises: BackendError if TensorRT-RTX is missing, refuses nodes (all of them are listed) or fails to build;
    UsageError if `graph` cannot be read or `engine` not be written.
    """
    if not graph.is_file():
        raise UsageError(
            problem("graph", received=f"no file at '{graph}'", expected="an ONNX file", fix="export the model first")
        )
    trt = _load_tensorrt()
    # TensorRT calls the logger through a raw pointer: it has to outlive the builder, the network and the parser.
    logger = _make_logger(trt)
    with _replacing(engine) as file:
        return _build(trt, logger, graph, file)


def _load_tensorrt() -> Any:
    try:
        return importlib.import_module(MODULE)
    except (ImportError, OSError) as error:  # OSError: the wheel with the shared libraries is missing or unfit
        raise BackendError(
            problem(
                "TensorRT-RTX",
                received=f"{type(error).__name__}: {_one_line(str(error))}",
                expected=f"an importable '{MODULE}'",
                fix="pip install 'sinkexport[tensorrt]' (Linux x86-64 and Windows)",
            )
        ) from None


def _build(trt: Any, logger: Any, graph: Path, file: IO[bytes] | None) -> EngineReport:
    builder = trt.Builder(logger)
    # Strongly typed: the graph's own dtypes are final, TensorRT may not lower a float32 sum to float16.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)

    start = time.perf_counter()
    # From the path, not from bytes: this resolves external weights, and a model above 2 GiB has no single protobuf.
    if not parser.parse_from_file(str(graph)):
        raise _parse_failure(trt, parser, logger, graph)
    parse_s = time.perf_counter() - start

    layers = [network.get_layer(i) for i in range(network.num_layers)]
    writer = _make_writer(trt, file)
    start = time.perf_counter()
    built = builder.build_serialized_network_to_stream(network, builder.create_builder_config(), writer)
    build_s = time.perf_counter() - start
    if writer.error is not None:
        raise _write_failure(writer.error)
    if not built:
        raise BackendError(
            problem(
                f"engine of '{graph.name}'",
                received=_listing(logger.errors) or "a failure without a message",
                expected=f"a graph that TensorRT-RTX {trt.__version__} can build",
                fix="report it with the graph: exports should build",
            )
        )
    return EngineReport(
        tensorrt=str(trt.__version__),
        layer_types=dict(collections.Counter(layer.type.name for layer in layers).most_common()),
        inputs=tuple(network.get_input(i).name for i in range(network.num_inputs)),
        outputs=tuple(network.get_output(i).name for i in range(network.num_outputs)),
        in_place=tuple(
            (layer.get_input(0).name, layer.get_output(0).name)  # input 0 is the cache, 1 the rows, 2 the indices
            for layer in layers
            if layer.type == trt.LayerType.KV_CACHE_UPDATE
        ),
        warnings=tuple(dict.fromkeys(logger.warnings)),
        parse_s=parse_s,
        build_s=build_s,
        engine_bytes=writer.num_bytes,
    )


def _parse_failure(trt: Any, parser: Any, logger: Any, graph: Path) -> BackendError:
    """Every node that the parser refused, in one error: to meet them one at a time would take an export each."""
    found, fix = [], "report it with the graph: exports should build"
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        cause = _one_line(error.desc())
        why = f"{error.code().name}, {cause} in {error.func()}"
        if error.node_operator():
            name = f" '{error.node_name()}'" if error.node_name() else ""
            found.append(f"node {error.node()} {error.node_operator()}{name} ({why})")
        else:  # about the file, e.g. no weights beside it: which one is only in the log, among echoes of the cause
            found += [why, *(line for line in logger.errors if cause not in line)]
            fix = "the bundle is incomplete or damaged: copy the whole folder or export again"
    return BackendError(
        problem(
            f"'{graph.name}'",
            received=_listing(found) or "an unreadable ONNX file",
            expected=f"a graph that TensorRT-RTX {trt.__version__} parses",
            fix=fix,
        )
    )


def _write_failure(error: OSError) -> UsageError:
    return UsageError(
        problem(
            "engine file",
            received=_one_line(str(error)),
            expected="a writable place with enough room",
            fix="free some space or choose another path",
        )
    )


@contextlib.contextmanager
def _replacing(target: Path | None) -> Iterator[IO[bytes] | None]:
    """A temporary file that becomes `target` when the block succeeds and vanishes otherwise (Ctrl-C included)."""
    if target is None:
        yield None
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _write_failure(error) from None
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:  # unbuffered: a full disk shows at write, not at close
            yield file
        Path(name).chmod(0o644)  # mkstemp's 0600 would surprise whoever copies a bundle
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _listing(items: list[str]) -> str:
    shown = "; ".join(items[:MAX_REPORTED_ERRORS])
    return shown + (f"; and {len(items) - MAX_REPORTED_ERRORS} more" if len(items) > MAX_REPORTED_ERRORS else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())


# TensorRT's interfaces are base classes, which exist only once the package is imported: hence classes in functions.


def _make_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps errors and warnings instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(_one_line(message))
            # A second build in one process warns that the first one's logger stays registered: harmless noise.
            elif severity == trt.ILogger.Severity.WARNING and "createInferBuilder differs" not in message:
                self.warnings.append(_one_line(message))

    return Logger()


def _make_writer(trt: Any, file: IO[bytes] | None) -> Any:
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
