"""How the kernels' C interfaces refuse parameters."""

from __future__ import annotations

from typing import Any

INVALID_VALUE = 1  # cudaErrorInvalidValue


def assert_refused(library: Any, params: Any, expected: str, *scratch: int) -> None:
    """In one line that begins with `expected`, and before the device is asked for anything. scratch: for a launch."""
    problem = library.problem(params)
    assert problem is not None
    assert problem.startswith(expected)
    assert "\n" not in problem
    assert library.launch(params, *scratch) == INVALID_VALUE
