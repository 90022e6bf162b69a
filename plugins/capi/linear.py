"""ctypes declarations of capi/linear.cpp. The caller owns all memory and passes device addresses."""

from __future__ import annotations

import ctypes
from pathlib import Path

DTYPES = {"float16": 0, "bfloat16": 1}
WEIGHT_TYPES = {"int8": 0, "half": 1}


class LinearParams(ctypes.Structure):
    """kernels/linear.h's struct, field by field; pointers are device addresses, 0 or None for null."""

    _fields_ = (
        ("num_rows", ctypes.c_int),
        ("num_inputs", ctypes.c_int),
        ("num_outputs", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("constant_weight", ctypes.c_bool),
        ("weight_type", ctypes.c_int),
    )


class Linear:
    """The functions of a built library.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: it was built from another version of the struct.
    """

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._problem = functions.sinkexport_linear_problem
        self._workspace_bytes = functions.sinkexport_linear_workspace_bytes
        self._launch = functions.sinkexport_linear
        params_bytes = functions.sinkexport_linear_params_bytes
        pointer = ctypes.POINTER(LinearParams)
        self._problem.argtypes, self._problem.restype = [pointer], ctypes.c_char_p
        self._workspace_bytes.argtypes, self._workspace_bytes.restype = [pointer], ctypes.c_size_t
        self._launch.argtypes, self._launch.restype = [pointer, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
        params_bytes.argtypes, params_bytes.restype = [], ctypes.c_size_t
        if params_bytes() != ctypes.sizeof(LinearParams):
            raise RuntimeError(
                f"LinearParams: received {params_bytes()} bytes in {library}, expected "
                f"{ctypes.sizeof(LinearParams)}; build the library of this source tree"
            )

    def problem(self, params: LinearParams) -> str | None:
        """One line that says why this cannot be launched; None: it can."""
        text = self._problem(ctypes.byref(params))
        return None if text is None else text.decode()

    def workspace_bytes(self, params: LinearParams) -> int:
        return int(self._workspace_bytes(ctypes.byref(params)))

    def launch(self, params: LinearParams, workspace: int = 0, stream: int = 0) -> int:
        """Launches on a cudaStream_t; returns a cudaError_t, 0 for success."""
        return int(self._launch(ctypes.byref(params), workspace, stream))
