"""Weights of a bundle on the CPU: each file mapped once in the process, for all of its graphs.

ONNX Runtime maps the weights of each session by itself, and what two graphs have mapped counts twice in the resident
size. Twin of runtime/cpp/src/backends/weights.cpp.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np
import onnxruntime as ort

from sinkrt.backends.external_tensors import ExternalTensor, external_tensors
from sinkrt.contract import Manifest

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
"""NumPy's names of onnx.TensorProto.DataType: what the weights of a bundle are made of."""


class SharedWeights:
    """Weights that several graphs read from one mapping. It must live as long as the sessions that it was given to.

    A tensor that does not fit its file, or is of another type, is not shared: ONNX Runtime reads it itself, or refuses
    the graph. A file that is replaced later stays as it was for the sessions that have it mapped.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._bundle, self._files = bundle, frozenset(manifest.files)
        self._maps: dict[str, np.ndarray | None] = {}  # by file: uint8 [bytes]
        self._values: dict[ExternalTensor, ort.OrtValue | None] = {}

    def give(self, graph_file: str, options: ort.SessionOptions) -> None:
        """Let a session that is made with `options` use these weights. graph_file: of the bundle."""
        try:
            tensors = external_tensors((self._bundle / graph_file).read_bytes())
        except (OSError, ValueError):
            return
        named = {tensor.name: tensor for tensor in tensors}
        if len(named) != len(tensors):
            return
        for tensor in tensors:
            if tensor not in self._values:
                self._values[tensor] = self._value(tensor)
            if (value := self._values[tensor]) is not None:
                options.add_initializer(tensor.name, value)

    def _value(self, tensor: ExternalTensor) -> ort.OrtValue | None:
        """The tensor in the mapping; None: it cannot be shared."""
        data = self._mapped(tensor.file)
        dtype = np.dtype(_DTYPES.get(tensor.data_type, "V0"))
        num_bytes = math.prod(tensor.shape) * dtype.itemsize
        if (
            data is None
            or num_bytes == 0
            or tensor.num_bytes not in (None, num_bytes)
            or not 0 <= tensor.offset <= data.size - num_bytes
            or tensor.offset % dtype.itemsize
        ):
            return None
        array = data[tensor.offset : tensor.offset + num_bytes].view(dtype).reshape(tensor.shape)
        value = ort.OrtValue.ortvalue_from_numpy(array)
        return value if value.data_ptr() == array.ctypes.data else None  # not a copy

    def _mapped(self, name: str) -> np.ndarray | None:
        """A file of the bundle, uint8 [bytes]; None: the manifest does not list it, or it cannot be mapped."""
        if name not in self._maps:
            self._maps[name] = _map(self._bundle / name) if name in self._files else None
        return self._maps[name]


def _map(path: Path) -> np.ndarray | None:
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError):  # ValueError: it is empty
        return None
