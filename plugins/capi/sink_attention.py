"""ctypes form of the C interface of sink attention and stream angles (sink_attention.cpp).

Device pointers are plain integers, for example a CUDA tensor's ``data_ptr()``. Fields, shapes and units are those of
kernels/sink_attention.h and kernels/stream_angles.h.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

DTYPES = {"float16": 0, "bfloat16": 1}


class SinkAttentionParams(ctypes.Structure):
    """The twin of the C++ struct."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("batch", "num_tokens", "num_q_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int) for name in ("num_sinks", "window_size", "dtype")),
        ("int8_window", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        ("stream_rows", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("position", "num_valid", "sink_k", "sink_v")),
        *((name, ctypes.c_void_p) for name in ("window_k", "window_v", "window_k_scale", "window_v_scale")),
        *((name, ctypes.c_void_p) for name in ("shift_cos", "shift_sin", "frequency")),
        ("rope_scaling", ctypes.c_float),
        ("rotary_dim", ctypes.c_int),
        ("interleaved", ctypes.c_bool),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("alibi_slopes", "sink_logit", "sink_scale", "gate")),
        ("gate_dim", ctypes.c_int),
        ("out", ctypes.c_void_p),
    )


class StreamAnglesParams(ctypes.Structure):
    """The twin of the C++ struct."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("batch", "num_tokens", "num_frequencies", "behind")),
        *((name, ctypes.c_void_p) for name in ("position", "frequency", "cos", "sin")),
    )


class SinkAttention:
    """A loaded library. path: one that holds capi/sink_attention.cpp.

    Raises: OSError if it cannot be loaded, ValueError if its structs have other sizes than these.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        attention, angles = ctypes.POINTER(SinkAttentionParams), ctypes.POINTER(StreamAnglesParams)
        signatures = {
            "sink_attention_params_bytes": ([], ctypes.c_size_t),
            "stream_angles_params_bytes": ([], ctypes.c_size_t),
            "sink_attention_problem": ([attention], ctypes.c_char_p),
            "sink_attention_workspace_bytes": ([attention], ctypes.c_size_t),
            "sink_attention_launch": ([attention, ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int),
            "stream_angles_launch": ([angles, ctypes.c_void_p], ctypes.c_int),
        }
        for name, (arguments, result) in signatures.items():
            function = getattr(self._library, f"sinkexport_{name}")
            function.argtypes, function.restype = arguments, result
        for struct, size in (
            (SinkAttentionParams, self._library.sinkexport_sink_attention_params_bytes()),
            (StreamAnglesParams, self._library.sinkexport_stream_angles_params_bytes()),
        ):
            if ctypes.sizeof(struct) != size:
                raise ValueError(
                    f"{struct.__name__}: received a library whose struct has {size} bytes, expected "
                    f"{ctypes.sizeof(struct)}; build it from this commit"
                )

    def problem(self, params: SinkAttentionParams) -> str | None:
        """What is wrong with the parameters, on one line; None if they can be launched."""
        text = self._library.sinkexport_sink_attention_problem(ctypes.byref(params))
        return None if text is None else text.decode()

    def workspace_bytes(self, params: SinkAttentionParams) -> int:
        """Device scratch that a launch of these shapes needs, whatever its pointers."""
        return int(self._library.sinkexport_sink_attention_workspace_bytes(ctypes.byref(params)))

    def launch(self, params: SinkAttentionParams, workspace: int = 0, stream: int = 0) -> int:
        """Starts the kernels on a CUDA stream. Returns a cudaError_t: 0 is success."""
        return int(self._library.sinkexport_sink_attention_launch(ctypes.byref(params), workspace, stream))

    def launch_angles(self, params: StreamAnglesParams, stream: int = 0) -> int:
        """The same for stream angles."""
        return int(self._library.sinkexport_stream_angles_launch(ctypes.byref(params), stream))
