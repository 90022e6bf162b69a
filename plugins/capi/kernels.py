"""The kernels through ctypes: each header's struct, and a class that launches its kernel from a built library."""

from __future__ import annotations

import ctypes

from plugins.capi.header import fields
from plugins.capi.library import Launcher, LauncherWithWorkspace


class LinearParams(ctypes.Structure):
    """kernels/linear.h."""

    _fields_ = fields("linear.h", "LinearParams")


class Linear(LauncherWithWorkspace[LinearParams]):
    """capi/linear.cpp."""

    NAME, PARAMS = "linear", LinearParams


class ExpertLinearParams(ctypes.Structure):
    """kernels/expert_linear.h."""

    _fields_ = fields("expert_linear.h", "ExpertLinearParams")


class ExpertLinear(Launcher[ExpertLinearParams]):
    """capi/expert_linear.cpp."""

    NAME, PARAMS = "expert_linear", ExpertLinearParams


class Int4RowsParams(ctypes.Structure):
    """kernels/int4_rows.h."""

    _fields_ = fields("int4_rows.h", "Int4RowsParams")


class Int4Rows(Launcher[Int4RowsParams]):
    """capi/int4_rows.cpp."""

    NAME, PARAMS = "int4_rows", Int4RowsParams


class RmsNormParams(ctypes.Structure):
    """kernels/rms_norm.h."""

    _fields_ = fields("rms_norm.h", "RmsNormParams")


class RmsNorm(Launcher[RmsNormParams]):
    """capi/rms_norm.cpp."""

    NAME, PARAMS = "rms_norm", RmsNormParams


class GatedActivationParams(ctypes.Structure):
    """kernels/gated_activation.h."""

    _fields_ = fields("gated_activation.h", "GatedActivationParams")


class GatedActivation(Launcher[GatedActivationParams]):
    """capi/gated_activation.cpp."""

    NAME, PARAMS = "gated_activation", GatedActivationParams


class SinkAttentionParams(ctypes.Structure):
    """kernels/sink_attention.h."""

    _fields_ = fields("sink_attention.h", "SinkAttentionParams")


class SinkAttention(LauncherWithWorkspace[SinkAttentionParams]):
    """capi/sink_attention.cpp."""

    NAME, PARAMS = "sink_attention", SinkAttentionParams


class StreamAnglesParams(ctypes.Structure):
    """kernels/stream_angles.h."""

    _fields_ = fields("stream_angles.h", "StreamAnglesParams")


class StreamAngles(Launcher[StreamAnglesParams]):
    """capi/stream_angles.cpp."""

    NAME, PARAMS = "stream_angles", StreamAnglesParams
