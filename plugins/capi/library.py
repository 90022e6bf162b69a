"""What the C interfaces have in common (interface.h): a struct, what is wrong with it, a launch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

Params = TypeVar("Params", bound=ctypes.Structure)


class Launcher(Generic[Params]):
    """The functions ``sinkexport_NAME``, ``.._problem`` and ``.._params_bytes`` of a built library.

    A subclass says NAME and PARAMS, the struct. The caller owns all memory and passes device addresses.

    Raises:
        OSError: the library cannot be loaded.
        ValueError: it was built from another version of the struct.
    """

    NAME: ClassVar[str]
    PARAMS: ClassVar[type[ctypes.Structure]]

    def __init__(self, path: Path) -> None:
        self.path = path
        functions = self._functions = ctypes.CDLL(str(path))
        self._launch = getattr(functions, f"sinkexport_{self.NAME}")
        self._problem = getattr(functions, f"sinkexport_{self.NAME}_problem")
        params_bytes = getattr(functions, f"sinkexport_{self.NAME}_params_bytes")
        params = self.PARAMS
        pointer = ctypes.POINTER(params)
        self._launch.argtypes, self._launch.restype = [pointer, ctypes.c_void_p], ctypes.c_int
        self._problem.argtypes, self._problem.restype = [pointer], ctypes.c_char_p
        params_bytes.argtypes, params_bytes.restype = [], ctypes.c_size_t
        if params_bytes() != ctypes.sizeof(params):
            raise ValueError(
                f"{params.__name__}: received a library whose struct has {params_bytes()} bytes, expected "
                f"{ctypes.sizeof(params)}; build it from this commit"
            )

    def problem(self, params: Params) -> str | None:
        """One line that says why this cannot be launched; None: it can."""
        text = self._problem(ctypes.byref(params))
        return None if text is None else text.decode()

    def launch(self, params: Params, stream: int = 0) -> int:
        """Launches on a cudaStream_t; returns a cudaError_t, 0 for success."""
        return int(self._launch(ctypes.byref(params), stream))


class LauncherWithWorkspace(Launcher[Params]):
    """One more function, ``sinkexport_NAME_workspace_bytes``, and one more argument of a launch."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        pointer = ctypes.POINTER(self.PARAMS)
        self._workspace_bytes = getattr(self._functions, f"sinkexport_{self.NAME}_workspace_bytes")
        self._workspace_bytes.argtypes, self._workspace_bytes.restype = [pointer], ctypes.c_size_t
        self._launch.argtypes = [pointer, ctypes.c_void_p, ctypes.c_void_p]

    def workspace_bytes(self, params: Params) -> int:
        """Device scratch that a launch of these shapes needs, whatever its pointers."""
        return int(self._workspace_bytes(ctypes.byref(params)))

    def launch(self, params: Params, workspace: int = 0, stream: int = 0) -> int:  # type: ignore[override]
        """Launches on a cudaStream_t; returns a cudaError_t, 0 for success."""
        return int(self._launch(ctypes.byref(params), workspace, stream))
