"""ctypes declarations of capi/expert_linear.cpp. The caller owns all memory and passes device addresses."""

from __future__ import annotations

import ctypes

from plugins.capi.library import Launcher


class ExpertLinearParams(ctypes.Structure):
    """kernels/expert_linear.h's struct, field by field; pointers are device addresses, 0 or None for null."""

    _fields_ = (
        ("num_experts", ctypes.c_int),
        ("num_picks", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("num_inputs", ctypes.c_int),
        ("num_outputs", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("weight_type", ctypes.c_int),
        ("picks", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


class ExpertLinear(Launcher[ExpertLinearParams]):
    """Of capi/expert_linear.cpp."""

    NAME, PARAMS = "expert_linear", ExpertLinearParams
