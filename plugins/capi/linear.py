"""ctypes declarations of capi/linear.cpp. The caller owns all memory and passes device addresses."""

from __future__ import annotations

import ctypes

from plugins.capi.library import LauncherWithWorkspace

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


class Linear(LauncherWithWorkspace[LinearParams]):
    """Of capi/linear.cpp."""

    NAME, PARAMS = "linear", LinearParams
