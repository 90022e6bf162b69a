"""ctypes declarations of capi/gated_activation.cpp. The caller owns all memory and passes device addresses."""

from __future__ import annotations

import ctypes

from plugins.capi.library import Launcher

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class GatedActivationParams(ctypes.Structure):
    """kernels/gated_activation.h's struct, field by field; pointers are device addresses, 0 or None for null."""

    _fields_ = (
        ("num_rows", ctypes.c_int),
        ("width", ctypes.c_int),
        ("row_stride", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


class GatedActivation(Launcher[GatedActivationParams]):
    """Of capi/gated_activation.cpp."""

    NAME, PARAMS = "gated_activation", GatedActivationParams
