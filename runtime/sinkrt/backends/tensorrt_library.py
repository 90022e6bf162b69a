"""Parts that building and running engines share: TensorRT's package, its logger, this project's plugin in it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path, PurePosixPath
from typing import Any

from sinkrt.backends.shared_library import open_library, text_of
from sinkrt.contract import PLUGIN_ABI
from sinkrt.contract.constants import TENSORRT, TENSORRT_RTX
from sinkrt.engines import PLUGIN_FILE
from sinkrt.errors import BackendError, UsageError, problem

PLUGIN_LIBRARY = PurePosixPath(PLUGIN_FILE).name


def flavour(trt: Any) -> str:
    """Flavour of the package: ``TensorRT | TensorRT-RTX``."""
    return TENSORRT_RTX if trt.__name__.startswith("tensorrt_rtx") else TENSORRT


def is_strongly_typed(trt: Any) -> bool:
    """Whether networks are strongly typed: TensorRT 10 and later, and all of TensorRT-RTX."""
    return flavour(trt) == TENSORRT_RTX or int(trt.__version__.partition(".")[0]) >= 10


def plugin_facts(plugin: Path, what: str = "--plugin") -> tuple[str, int]:
    """The ABI of a plugin library and the major version of the TensorRT that it was compiled for.

    what: where it comes from, for messages.

    Raises: UsageError.
    """
    try:
        # For all to see: a plugin of TensorRT 8 finds the registry among the process's symbols.
        library = open_library(plugin, ctypes.RTLD_GLOBAL)
        abi, major = text_of(library, "sinkexport_plugin_abi"), library.sinkexport_plugin_tensorrt_major
    except (OSError, AttributeError) as error:
        raise UsageError(
            problem(
                what,
                received=f"'{plugin}' ({one_line(str(error))})",
                expected=f"the library {PLUGIN_LIBRARY}",
                fix="build it as plugins/README.md says",
            )
        ) from None
    return str(abi), int(major())


def load_plugin(trt: Any, registry: Any, plugin: Path, what: str = "--plugin") -> str:
    """Register the plugins with TensorRT. Returns: their ABI.

    registry: TensorRT's. None will do where networks are weakly typed: the library registers its plugins itself.

    Raises: UsageError if it is not a plugin for this TensorRT.
    """
    typed, version = is_strongly_typed(trt), f"{flavour(trt)} {trt.__version__}"
    if not typed:  # the registry's symbols, for the library to find: Python loads TensorRT for itself alone
        with contextlib.suppress(OSError):
            ctypes.CDLL("libnvinfer.so.8", mode=ctypes.RTLD_GLOBAL)
    abi, major = plugin_facts(plugin, what)
    for detail, received, expected, fits in (
        ("ABI", abi, PLUGIN_ABI, abi == PLUGIN_ABI),
        ("TensorRT", f"one for TensorRT {major}", f"one for {version}", (major >= 10) == typed),
    ):
        if not fits:
            raise UsageError(
                problem(
                    f"{what}: {detail}",
                    received=received,
                    expected=expected,
                    fix="compile the plugin of this version (plugins/README.md)",
                )
            )
    if typed and registry.load_library(str(plugin.resolve())) is None:
        raise UsageError(
            problem(
                what,
                received=f"'{plugin}', which {version} does not load",
                expected=f"the library {PLUGIN_LIBRARY}",
                fix="build it as plugins/README.md says",
            )
        )
    return abi


def create(kind: Any, logger: Any) -> Any:
    """Make a TensorRT object that needs the GPU's driver. kind: its class, `Builder` or `Runtime`.

    Raises: BackendError if TensorRT makes none, as where there is no driver or no GPU that it supports.
    """
    try:
        return kind(logger)
    except TypeError as error:  # all that pybind11 says of it: "factory function returned nullptr"
        raise BackendError(
            problem(
                f"TensorRT's {kind.__name__}",
                received=said(logger, str(error)),
                expected="a GPU that it supports and its driver",
                fix="check nvidia-smi",
            )
        ) from None


def said(logger: Any, otherwise: str = "a refusal without a reason") -> str:
    """TensorRT's reason: the first error, which the others follow from."""
    reason = logger.errors[0] if logger.errors else one_line(otherwise)
    logger.errors.clear()
    return str(reason)


def make_logger(trt: Any) -> Any:
    """Make an ILogger with lists `errors` and `warnings`.

    The class is in a function: its base exists only with the package.
    """

    class Logger(trt.ILogger):
        """Keep errors and warnings instead of printing them."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(one_line(message))
            # A second build in one process warns that the first one's logger stays registered: harmless noise.
            elif severity == trt.ILogger.Severity.WARNING and "createInferBuilder differs" not in message:
                self.warnings.append(one_line(message))

    return Logger()


def one_line(text: str) -> str:
    """Text without line breaks and runs of spaces."""
    return " ".join(text.split())
