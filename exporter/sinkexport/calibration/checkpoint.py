"""What a calibration has seen so far, in a file, so that one that was cut short goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.numpy

from sinkexport.calibration.observers import Resumable
from sinkexport.util import files

KEPT_BYTES = 2**30
"""Bytes that are written after each piece of text. Where there is more, only whole passes are kept."""

CHANNELS, RANGES, MOMENTS = "channels", "ranges", "moments"
"""Passes over the text, in their order; of the last kind there may be several."""


class Checkpoint:
    """One calibration's file. key: the calibration's; a file with another key is not read.

    A pass over the text is its kind and its number among those of its kind.
    """

    def __init__(self, path: Path | None, key: str, num_pieces: int) -> None:
        self._path = path
        self._key = key
        self._num_pieces = num_pieces

    def keep(self, this: tuple[str, int], observers: Mapping[str, Resumable], done: int) -> None:
        """Write all of it; a crash leaves the file that was there."""
        if self._path is None:
            return
        arrays = {f"{name}|{key}": value for name, o in observers.items() for key, value in o.state().items()}
        if done < self._num_pieces and sum(value.nbytes for value in arrays.values()) > KEPT_BYTES:
            return
        metadata = {"key": self._key, "pass": json.dumps(this), "done": json.dumps(done)}
        files.write_whole(self._path, safetensors.numpy.save(arrays, metadata), "--output")

    def restore(self, this: tuple[str, int], observers: Mapping[str, Resumable]) -> int:
        """Fill the observers with what was written in this pass or a later one. Returns: pieces that are done."""
        if self._path is None or not self._path.exists():
            return 0
        try:
            with safetensors.safe_open(self._path, "np") as file:
                metadata = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, safetensors.SafetensorError):
            return 0  # damaged: begin anew
        if metadata.get("key") != self._key:
            return 0
        kept = tuple(json.loads(metadata["pass"]))
        if _order(kept) < _order(this):  # nothing of this pass yet
            return 0
        for name, observer in observers.items():
            prefix = f"{name}|"
            observer.restore({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
        return int(metadata["done"]) if kept == this else self._num_pieces


def _order(this: tuple[str, int]) -> tuple[int, int]:
    return (CHANNELS, RANGES, MOMENTS).index(this[0]), this[1]
