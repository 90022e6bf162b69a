"""Parse an ONNX graph with TensorRT or TensorRT-RTX and build its engine.

TensorRT (10 and later, or 8.5 and 8.6) builds for the GPU of this machine. TensorRT-RTX compiles ahead of time for
every GPU generation that it supports, and finishes the kernels on the machine that runs them. So it builds an engine,
or proves that a graph can be built, where there is no GPU. The runtimes run engines.

The update of a state is decided here too. TensorRT turns ``TensorScatter(mode=linear, axis=2)`` into a KVCacheUpdate
layer, which writes in place (input and output bound to one buffer). It accepts that only from a graph input to a graph
output; `EngineReport.in_place` lists those pairs. The plugin SinkAttention needs a preview feature for the same.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from sinkrt.backends.tensorrt_library import create, is_strongly_typed, load_plugin, make_logger, one_line
from sinkrt.backends.tensorrt_library import flavour as flavour_of
from sinkrt.contract.constants import TENSORRT_RTX
from sinkrt.errors import BackendError, UsageError, problem

from sinkexport.tensorrt.engine_file import replacing_engine, write_engine
from sinkexport.tensorrt.options import BuildOptions, EngineReport

LoadPlugin = Callable[[Any, Any, Path], str]
"""TensorRT, its registry or None, the library -> the plugin's ABI."""

NO_KERNEL = "Could not find any implementation"
"""How TensorRT says that none of its kernels fits a layer."""

MAX_REPORTED_ERRORS = 8  # one line has to stay readable; the rest is counted


def build_engine(
    graph: Path, engine: Path | None = None, options: BuildOptions | None = None, load: LoadPlugin = load_plugin
) -> EngineReport:
    """Parse `graph` and build its engine; keep it at `engine`, or only report on it when that is None.

    graph: an ONNX file; external weights are read from beside it. Shapes must be static. load: registers the plugin.
    Where the version can, the engine is streamed out piece by piece; its file appears only when complete. So memory
    holds the weights once while TensorRT compiles, and not the finished engine on top.

    Raises: BackendError if TensorRT is missing, refuses nodes (all of them are listed) or fails to build; UsageError if
    a file cannot be read or written, or the plugin is not one for this TensorRT.
    """
    options = options or BuildOptions()
    if not graph.is_file():
        raise UsageError(
            problem("graph", received=f"no file at '{graph}'", expected="an ONNX file", fix="export the model first")
        )
    trt = _load_tensorrt(options.modules)
    # TensorRT calls the logger through a raw pointer: it has to outlive the builder, the network and the parser.
    logger = make_logger(trt)
    with replacing_engine(engine) as file:
        return _build(trt, logger, graph, file, options, load)


def _load_tensorrt(modules: tuple[str, ...]) -> Any:
    failures = []
    for module in modules:
        try:
            return importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: the wheel with the shared libraries is missing or unfit
            failures.append(f"{type(error).__name__}: {one_line(str(error))}")
    raise BackendError(
        problem(
            "TensorRT",
            received="; ".join(failures),
            expected="an importable " + " or ".join(f"'{module}'" for module in modules),
            fix="pip install 'sinkexport[tensorrt]' (TensorRT-RTX, Linux x86-64), or install NVIDIA's 'tensorrt'",
        )
    )


def _build(
    trt: Any, logger: Any, graph: Path, file: IO[bytes] | None, options: BuildOptions, load: LoadPlugin
) -> EngineReport:
    builder = create(trt.Builder, logger)
    typed, flavour = is_strongly_typed(trt), flavour_of(trt)
    abi = None
    if options.plugin is not None:
        registry = builder.get_plugin_registry() if typed else None  # the builder of TensorRT 8.5 has no such method
        abi = load(trt, registry, options.plugin)
    # Strongly typed: the graph's own dtypes are final, TensorRT may not lower a float32 sum to float16.
    flag = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flag.STRONGLY_TYPED if typed else flag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)

    start = time.perf_counter()
    # From the path, not from bytes: this resolves external weights, and a model above 2 GiB has no single protobuf.
    if not parser.parse_from_file(str(graph)):
        raise _parse_failure(trt, parser, logger, graph)
    parse_s = time.perf_counter() - start

    config = _configured(trt, builder, options)
    if typed and abi is not None:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if not typed:
        _hold_precision(trt, network, config, float32_values(graph))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    start = time.perf_counter()
    engine_bytes = write_engine(trt, builder, network, config, file)
    build_s = time.perf_counter() - start
    if not engine_bytes:
        raise BackendError(
            problem(
                f"engine of '{graph.name}'",
                received=_listing(logger.errors) or "a failure without a message",
                expected=f"a graph that {flavour} {trt.__version__} can build",
                fix=fix_of_failure(" ".join(logger.errors), has_strong_types=typed),
            )
        )
    if options.timing_cache is not None:
        with replacing_engine(options.timing_cache) as cache:
            if cache is not None:
                cache.write(memoryview(config.get_timing_cache().serialize()))
    gpu, capability = (None, None) if flavour == TENSORRT_RTX else current_gpu()
    return EngineReport(
        tensorrt=str(trt.__version__),
        flavour=flavour,
        plugin_abi=abi,
        gpu=gpu,
        compute_capability=capability,
        layer_types=dict(collections.Counter(layer.type.name for layer in layers).most_common()),
        inputs=tuple(network.get_input(i).name for i in range(network.num_inputs)),
        outputs=tuple(network.get_output(i).name for i in range(network.num_outputs)),
        in_place=_in_place(trt, layers),
        warnings=tuple(dict.fromkeys(logger.warnings)),
        parse_s=parse_s,
        build_s=build_s,
        engine_bytes=engine_bytes,
    )


def _configured(trt: Any, builder: Any, options: BuildOptions) -> Any:
    """Create the builder's configuration from `options`.

    Raises: UsageError for options that this TensorRT does not take.
    """
    config, flavour = builder.create_builder_config(), flavour_of(trt)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.tactic_sources is not None and not config.set_tactic_sources(options.tactic_sources):
        raise UsageError(
            problem(
                "--tactic-sources",
                received=options.tactic_sources,
                expected=f"bits of TacticSource that {flavour} {trt.__version__} knows",
                fix="give others, or leave it out",
            )
        )
    if options.timing_cache is not None:
        if flavour == TENSORRT_RTX:
            raise UsageError(
                problem(
                    "--timing-cache",
                    received=f"'{options.timing_cache}' with TensorRT-RTX",
                    expected="nothing: it keeps no timings",
                    fix="leave it out",
                )
            )
        saved = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        kept = config.create_timing_cache(saved)  # None: it is unreadable
        if kept is None or not config.set_timing_cache(kept, ignore_mismatch=False):
            raise UsageError(
                problem(
                    "--timing-cache",
                    received=f"'{options.timing_cache}', of another TensorRT or GPU",
                    expected="a cache that this machine wrote",
                    fix="choose a new file",
                )
            )
    return config


def _in_place(trt: Any, layers: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    """Names of the input and output of each KVCacheUpdate layer."""
    update = getattr(trt.LayerType, "KV_CACHE_UPDATE", None)
    return tuple(
        (layer.get_input(0).name, layer.get_output(0).name)  # input 0 is the cache, 1 the rows, 2 the indices
        for layer in layers
        if update is not None and layer.type == update
    )


def float32_values(graph: Path) -> frozenset[str]:
    """List the names of the values that `graph` computes in float32."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False).graph
    computed = {name for node in model.node for name in node.output}
    return frozenset(
        value.name
        for value in [*model.value_info, *model.output]
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name in computed
    )


def _hold_precision(trt: Any, network: Any, config: Any, float32: frozenset[str]) -> None:
    """Allow float16 in TensorRT 8, whose networks are weakly typed, but not where the graph has float32.

    Norms have float32: squares of massive activations overflow float16. INT8 states only pass through the plugin, but
    TensorRT needs some range for them.
    """
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.num_outputs == 1 and layer.get_output(0).name in float32:
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    for tensor in tensors:
        if tensor.dtype == trt.int8:
            config.set_flag(trt.BuilderFlag.INT8)
            tensor.set_dynamic_range(-127.0, 127.0)


def current_gpu() -> tuple[str | None, str | None]:
    """Find the name and compute capability (``9.0``) of the first GPU; None, None: no driver reports one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, len(name), device):
        return None, None
    numbers = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        number = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None, None
        numbers.append(str(number.value))
    return name.value.decode(errors="replace"), ".".join(numbers)


def fix_of_failure(errors: str, *, has_strong_types: bool) -> str:
    """What to try after TensorRT gave no engine.

    has_strong_types: TensorRT 10 and later. Before, matmuls of recurrent layers need cuBLAS.
    """
    if NO_KERNEL in errors and not has_strong_types:
        return "TensorRT 8 has no such kernel without cuBLAS 11: make that available, or use TensorRT 10"
    return "report it with the graph: exports should build"


def _parse_failure(trt: Any, parser: Any, logger: Any, graph: Path) -> BackendError:
    """Describe every node that the parser refused in one error: one at a time would take an export each."""
    found, fix = [], "report it with the graph: exports should build"
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        cause = one_line(error.desc())
        why = f"{error.code().name}, {cause} in {error.func()}"
        if hasattr(error, "node_operator") and error.node_operator():  # TensorRT 8 only counts nodes
            name = f" '{error.node_name()}'" if error.node_name() else ""
            found.append(f"node {error.node()} {error.node_operator()}{name} ({why})")
        else:  # about the file, e.g. no weights beside it: which one is only in the log, among echoes of the cause
            found += [why, *(line for line in logger.errors if cause not in line)]
            fix = "the bundle is incomplete or damaged: copy the whole folder or export again"
    return BackendError(
        problem(
            f"'{graph.name}'",
            received=_listing(found) or "an unreadable ONNX file",
            expected=f"a graph that {flavour_of(trt)} {trt.__version__} parses",
            fix=fix,
        )
    )


def _listing(items: list[str]) -> str:
    shown = "; ".join(items[:MAX_REPORTED_ERRORS])
    return shown + (f"; and {len(items) - MAX_REPORTED_ERRORS} more" if len(items) > MAX_REPORTED_ERRORS else "")
