"""Arrays that callers hand over, checked before anything is computed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sinkrt.errors import UsageError, problem


def token_ids(ids: npt.ArrayLike, shape: tuple[int, ...], vocab_size: int) -> npt.NDArray[np.int64]:
    """Ids as int64 of `shape`, each 0 .. vocab_size - 1.

    Raises: UsageError.
    """
    array = integers(ids)
    if array.shape != shape:
        raise UsageError(
            problem(
                "ids",
                received=f"{array.dtype} {list(array.shape)}",
                expected=f"integers {list(shape)}",
                fix="give each stream its tokens",
            )
        )
    _check_range(array, vocab_size)
    return array.astype(np.int64, copy=False)


def prompt_ids(ids: npt.ArrayLike, vocab_size: int, *, may_be_empty: bool) -> npt.NDArray[np.int64]:
    """Ids as int64 [N], each 0 .. vocab_size - 1; N >= 1 unless the prompt may be empty.

    Raises: UsageError.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or not (array.size or may_be_empty) or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(
            problem(
                "prompt",
                received=f"{array.dtype} {list(array.shape)}",
                expected="integers [N], N >= 1",
                fix="give some text",
            )
        )
    _check_range(array, vocab_size)
    return array.astype(np.int64)


def _check_range(array: np.ndarray, vocab_size: int) -> None:
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise UsageError(
            problem(
                "token id",
                received=int(outside[0]),
                expected=f"0 .. {vocab_size - 1}",
                fix="use the tokenizer of this model",
            )
        )


def valid_counts(num_valid: npt.ArrayLike | None, rows: int, width: int) -> npt.NDArray[np.int64]:
    """Counts as int64 [rows], each 1 .. width.

    Raises: UsageError.
    """
    if num_valid is None:
        return np.full(rows, width, dtype=np.int64)
    counts = integers(num_valid, "num_valid").reshape(-1)
    if counts.shape != (rows,) or counts.min() < 1 or counts.max() > width:
        raise UsageError(
            problem(
                "num_valid",
                received=counts.tolist(),
                expected=f"{rows} number(s) in 1 .. {width}",
                fix="leave a stream without tokens out of `streams`",
            )
        )
    return counts.astype(np.int64, copy=False)


def integers(ids: npt.ArrayLike, what: str = "ids") -> np.ndarray:
    """An array of integers, of any shape; an empty list counts as one.

    Raises: UsageError.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different lengths
        received = "rows of different lengths"
    else:
        if array.size == 0 or np.issubdtype(array.dtype, np.integer):
            return array
        received = f"{array.dtype} {list(array.shape)}"
    raise UsageError(problem(what, received=received, expected="an array of integers", fix="convert them to integers"))
