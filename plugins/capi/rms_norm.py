"""ctypes declarations of capi/rms_norm.cpp. The caller owns all memory and passes device addresses."""

from __future__ import annotations

import ctypes

from plugins.capi.library import Launcher


class RmsNormParams(ctypes.Structure):
    """kernels/rms_norm.h's struct, field by field; pointers are device addresses, 0 or None for null."""

    _fields_ = (
        ("num_rows", ctypes.c_int),
        ("row_length", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("float_weight", ctypes.c_bool),
        ("epsilon", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
    )


class RmsNorm(Launcher[RmsNormParams]):
    """Of capi/rms_norm.cpp."""

    NAME, PARAMS = "rms_norm", RmsNormParams
