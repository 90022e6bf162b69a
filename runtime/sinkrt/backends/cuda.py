"""The few calls of CUDA's runtime that backends need, by ctypes: memory, a stream, graphs.

No package is needed beyond CUDA's runtime library itself, which onnxruntime-gpu, TensorRT and PyTorch bring along.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sinkrt.contract import TensorSpec
from sinkrt.errors import BackendError, problem

MAJORS = (13, 12, 11)
ALIGNMENT_BYTES = 256
"""Alignment that TensorRT wants of addresses; cudaMalloc gives it."""

_MEMORY_ALLOCATION, _HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 2, 1, 2, 3
_COMPUTE_CAPABILITY = (75, 76)  # cudaDevAttrComputeCapabilityMajor, Minor
_CAPTURE_OF_THIS_THREAD = 1
_FIX = "check nvidia-smi, or use --backend ort"


class Cuda:
    """The first GPU.

    Raises: BackendError if there is no library, no driver or no GPU.
    """

    def __init__(self) -> None:
        self._library = _load()
        count = ctypes.c_int()
        error = self._library.cudaGetDeviceCount(ctypes.byref(count))
        if error or not count.value:
            raise BackendError(
                problem(
                    "CUDA device",
                    received=self._text(error) if error else "none",
                    expected="an NVIDIA GPU and its driver",
                    fix=_FIX,
                )
            )
        self._call("cudaSetDevice", 0)
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self.stream: int = stream.value or 0
        # Arrays and graphs refer to this object, so they are gone by then.
        weakref.finalize(self, self._library.cudaStreamDestroy, stream)

    @property
    def compute_capability(self) -> str:
        """The GPU's compute capability, as ``9.0``."""
        numbers = []
        for attribute in _COMPUTE_CAPABILITY:
            number = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(number), attribute, 0)
            numbers.append(str(number.value))
        return ".".join(numbers)

    def zeros(self, spec: TensorSpec) -> DeviceArray:
        """Allocate a tensor of zeros in device memory, freed with its last reference.

        Raises: BackendError if there is too little memory.
        """
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(spec.nbytes, 1)), what=spec.name)
        array = DeviceArray(self, address.value or 0, spec.shape, np.dtype(spec.dtype))
        weakref.finalize(array, self._library.cudaFree, ctypes.c_void_p(array.address))
        self._call("cudaMemset", ctypes.c_void_p(array.address), 0, ctypes.c_size_t(max(spec.nbytes, 1)))
        return array

    def pinned(self, spec: TensorSpec) -> np.ndarray:
        """Allocate a NumPy array of zeros in pinned host memory, which the GPU copies from and to directly."""
        address = ctypes.c_void_p()
        self._call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(max(spec.nbytes, 1)), 0, what=spec.name)
        memory = (ctypes.c_uint8 * spec.nbytes).from_address(address.value or 0)
        weakref.finalize(memory, self._library.cudaFreeHost, address)
        array = np.frombuffer(memoryview(memory), dtype=spec.dtype).reshape(spec.shape)
        array.fill(0)
        return array

    def to_device(self, target: int, source: np.ndarray) -> None:
        """Copy to device memory. source: C-contiguous."""
        self._copy(target, source.ctypes.data, source.nbytes, _HOST_TO_DEVICE)

    def to_host(self, target: np.ndarray, source: int) -> None:
        """Copy from device memory. target: C-contiguous."""
        self._copy(target.ctypes.data, source, target.nbytes, _DEVICE_TO_HOST)

    def on_device(self, target: int, source: int, num_bytes: int) -> None:
        """Copy from device memory to device memory, on the stream."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(num_bytes),
            _DEVICE_TO_DEVICE,
            ctypes.c_void_p(self.stream),
        )

    def synchronize(self) -> None:
        """Wait for the stream.

        Raises: BackendError with what has failed on it.
        """
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record what `work` puts on the stream as one CUDA graph, to be called any number of times.

        `work` is not run, but kept with all that it refers to: the graph uses its buffers.

        Returns: None if a part of it cannot be recorded.

        Raises: BackendError if what was on the stream before has failed.
        """
        self.synchronize()
        stream, graph, recorded = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_OF_THIS_THREAD)
        whole = False
        try:
            work()
            whole = True
        except BackendError:
            pass
        finally:  # whatever work raises: a stream that stays in capture takes nothing else
            ended = self._library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
            made = (
                whole
                and ended
                and not self._library.cudaGraphInstantiateWithFlags(
                    ctypes.byref(recorded), graph, ctypes.c_ulonglong(0)
                )
            )
            if graph.value:
                self._library.cudaGraphDestroy(graph)
            if not made:
                self._library.cudaGetLastError()  # the next call must not report it again
        if not made:
            return None
        replay = _Replay(functools.partial(self._call, "cudaGraphLaunch", recorded, stream), work)
        weakref.finalize(replay, self._library.cudaGraphExecDestroy, recorded)
        return replay

    def _copy(self, target: int, source: int, num_bytes: int, kind: int) -> None:
        self._call("cudaMemcpy", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(num_bytes), kind)

    def _call(self, name: str, *arguments: Any, what: str | None = None) -> None:
        error = getattr(self._library, name)(*arguments)
        if not error:
            return
        self._library.cudaGetLastError()
        if error == _MEMORY_ALLOCATION:
            raise BackendError(
                problem(
                    "GPU memory",
                    received=f"too little for '{what or name}'",
                    expected="room for weights and cache",
                    fix="free some, or export with a smaller window or an INT8 recipe",
                )
            )
        raise BackendError(
            problem(
                f"CUDA: {name}",
                received=self._text(error),
                expected="success",
                fix="load the session again; if that fails too, restart the program",
            )
        )

    def _text(self, error: int) -> str:
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        text: bytes = self._library.cudaGetErrorString(error)
        return text.decode(errors="replace")


class DeviceArray:
    """A dense tensor in device memory. Its first axis is indexed as NumPy's; what is read are copies on the host.

    address: of its first element. shape, dtype: as NumPy's.
    """

    def __init__(self, cuda: Cuda, address: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.address, self.shape, self.dtype = address, shape, dtype
        self._cuda = cuda
        self._owner: DeviceArray | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape)) * self.itemsize

    def row(self, index: int) -> DeviceArray:
        """Row of that index, [1, ...]: the same memory."""
        view = DeviceArray(self._cuda, self._address_of(index), (1, *self.shape[1:]), self.dtype)
        view._owner = self
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("reading device memory makes a copy")
        return np.asarray(self[...], dtype=dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        chosen = np.arange(self.shape[0])[key]
        out = np.empty((np.size(chosen), *self.shape[1:]), self.dtype)
        for index, row in self._pieces(chosen, out):
            self._cuda.to_host(row, self._address_of(index))
        return out.reshape(np.shape(chosen) + self.shape[1:])

    def __setitem__(self, key: Any, value: Any) -> None:
        chosen = np.arange(self.shape[0])[key]
        rows = np.broadcast_to(np.asarray(value, self.dtype), np.shape(chosen) + self.shape[1:])
        rows = np.ascontiguousarray(rows).reshape(-1, *self.shape[1:])
        for index, row in self._pieces(chosen, rows):
            self._cuda.to_device(self._address_of(index), row)

    def _pieces(self, chosen: Any, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Pairs of first row and host memory, one a copy: rows that follow each other are copied at once."""
        if np.array_equal(chosen, np.arange(self.shape[0])):
            yield 0, rows
            return
        for place, index in enumerate(np.atleast_1d(chosen).tolist()):
            yield index, rows[place : place + 1]

    def _address_of(self, row: int) -> int:
        return self.address + row * (self.nbytes // self.shape[0])


class _Replay:
    """A recorded CUDA graph. It is destroyed before `work` is dropped, and so before buffers that only work holds."""

    def __init__(self, launch: Callable[[], None], work: Callable[[], None]) -> None:
        self._launch, self._work = launch, work

    def __call__(self) -> None:
        self._launch()


class Staged:
    """A tensor in device memory with its copy on the host.

    host: pinned NumPy array. device: what graphs are bound to.
    """

    def __init__(self, cuda: Cuda, spec: TensorSpec) -> None:
        self._cuda = cuda
        self.host, self.device = cuda.pinned(spec), cuda.zeros(spec)

    def upload(self) -> None:
        """Copy from host to device."""
        self._cuda.to_device(self.device.address, self.host)

    def download(self) -> None:
        """Copy from device to host."""
        self._cuda.to_host(self.host, self.device.address)


def _load() -> ctypes.CDLL:
    """Load libcudart: that of NVIDIA's Python packages, or the system's."""
    names = [f"libcudart.so.{major}" for major in MAJORS[:-1]] + ["libcudart.so.11.0", "libcudart.so"]
    folders = []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        folders += [Path(root) / part / "lib" for part in ("cu13", "cuda_runtime")]
    candidates = [str(folder / name) for folder in folders for name in names if (folder / name).is_file()]
    for candidate in [*candidates, *names]:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise BackendError(
        problem(
            "CUDA",
            received="no libcudart",
            expected="CUDA's runtime library",
            fix="pip install 'sinkexport[cuda]', or use --backend ort",
        )
    )
