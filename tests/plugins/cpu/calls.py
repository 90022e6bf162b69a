"""Calls of the kernels' C interface: in this process, or of an emulated processor by replay files (capi/replay)."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from plugins.capi.header import fields
from tests.plugins.cpu.guarded import Guarded
from tests.plugins.cpu.library import ISAS, KERNELS, library

ALIGNMENTS = {"weight": 64, "scale": 64}
"""Bytes; other arrays lie on a multiple of their elements."""


class LinearParams(ctypes.Structure):
    """kernels/linear.h."""

    _fields_ = fields("linear.h", "LinearParams", KERNELS)


class RowsParams(ctypes.Structure):
    """kernels/linear.h."""

    _fields_ = fields("linear.h", "RowsParams", KERNELS)


class SinkAttentionParams(ctypes.Structure):
    """kernels/sink_attention.h."""

    _fields_ = fields("sink_attention.h", "SinkAttentionParams", KERNELS)


PARAMS = {"linear": LinearParams, "rows": RowsParams, "sink_attention": SinkAttentionParams}


@dataclass
class Call:
    """One call: the kernel's name, its numbers, its arrays by the field that points to them, its instruction set."""

    name: str
    numbers: dict[str, float]
    arrays: dict[str, np.ndarray]
    isa: str
    threads: int = 1
    output: str = "y"
    aliases: dict[str, str] = field(default_factory=dict)  # fields that point to another's array
    results: np.ndarray | None = field(default=None, repr=False)

    def present(self) -> dict[str, np.ndarray]:
        """The arrays that there are."""
        return {name: array for name, array in self.arrays.items() if array is not None}


def problem(call: Call) -> str | None:
    """The line by which the kernel refuses the call, or None. Pointers are what the arrays' addresses are."""
    find = getattr(library(), f"sinkexport_cpu_{call.name}_problem")
    find.restype = ctypes.c_char_p
    pointers = {name: array.ctypes.data for name, array in call.present().items()}
    text = find(ctypes.byref(PARAMS[call.name](**call.numbers, **pointers)))
    return None if text is None else text.decode()


def run_here(calls: Sequence[Call]) -> None:
    """Fill in results. Every array ends at a page without access, and what lies before it must stay as it was."""
    for call in calls:
        memory = {name: Guarded(array, ALIGNMENTS.get(name, array.itemsize)) for name, array in call.present().items()}
        addresses = {name: one.address for name, one in memory.items()}
        addresses |= {name: addresses[other] for name, other in call.aliases.items()}
        params = PARAMS[call.name](**call.numbers, **addresses)
        find = getattr(library(), f"sinkexport_cpu_{call.name}_problem")
        find.restype = ctypes.c_char_p
        refusal = find(ctypes.byref(params))
        assert refusal is None, refusal
        getattr(library(), f"sinkexport_cpu_{call.name}")(ctypes.byref(params), ISAS.index(call.isa), call.threads)
        assert all(one.is_intact() for one in memory.values()), call.name
        for name, array in call.present().items():
            if name != call.output:
                same = np.array_equal(memory[name].array, array, equal_nan=array.dtype.kind == "f")
                assert same, f"{name} was written to"
        call.results = memory[call.output].array.copy()


def replay_bytes(call: Call) -> bytes:
    """A call as capi/replay/main.cpp reads it: a header, the struct, where its pointers point, the arrays."""
    params_type = PARAMS[call.name]
    params = params_type(**call.numbers)
    blob, pointers = bytearray(), []
    for name, array in call.present().items():
        blob += b"\xa5" * (64 - len(blob) % 64 + 64)
        pointers.append((getattr(params_type, name).offset, len(blob)))
        blob += np.ascontiguousarray(array).tobytes()
    blob += b"\xa5" * 128
    header = struct.pack(
        "<32siiiiq",
        call.name.encode(),
        ISAS.index(call.isa),
        call.threads,
        len(bytes(params)),
        len(pointers),
        len(blob),
    )
    places = b"".join(struct.pack("<qq", *pointer) for pointer in pointers)
    return header + bytes(params) + places + bytes(blob)


def replayed(command: Sequence[str], calls: Sequence[Call], folder: Path) -> list[dict[str, np.ndarray]]:
    """All arrays of each call, as a program leaves them that reads calls from a file and writes the arrays back.

    What lies between the arrays must stay as it was.
    """
    before, after = folder / "calls", folder / "results"
    texts = [replay_bytes(call) for call in calls]
    before.write_bytes(b"".join(texts))
    done = subprocess.run([*command, str(before), str(after)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    blobs, start, results = after.read_bytes(), 0, []
    for call, text in zip(calls, texts, strict=True):
        size = struct.unpack_from("<32siiiiq", text)[-1]
        blob, original = bytearray(blobs[start : start + size]), text[-size:]
        start, at, arrays = start + size, 0, {}
        for name, array in call.present().items():
            at += 64 - at % 64 + 64
            arrays[name] = np.frombuffer(blob, array.dtype, array.size, at).reshape(array.shape).copy()
            blob[at : at + array.nbytes] = original[at : at + array.nbytes]
            at += array.nbytes
        assert bytes(blob) == original, f"{call.name}: something beside the arrays was written to"
        results.append(arrays)
    return results


def run_replay(command: Sequence[str], calls: Sequence[Call], folder: Path) -> None:
    """Fill in results by `replayed`; no other array may be written to."""
    for call, arrays in zip(calls, replayed(command, calls, folder), strict=True):
        call.results = arrays[call.output]
        for name, array in call.present().items():
            assert name == call.output or array.tobytes() == arrays[name].tobytes(), f"{name} was written to"
