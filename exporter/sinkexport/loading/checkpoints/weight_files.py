"""Weight files of a model folder and the tensors in them, read without transformers.

The order of preference is transformers' own. What it would read in silence beside another file that says otherwise is
refused: a single file beside the index of a split one, a shard of another save.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.checkpoints.file_tensor import FileTensor
from sinkexport.loading.checkpoints.safetensors_reader import LFS_MARK, lfs_pointer, read_safetensors

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
POINTER_BYTES = 1024
"""Git LFS pointers are shorter."""

READ_SUFFIXES = frozenset((".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf"))
SHOWN = 3
"""Names in an error; the others are counted."""


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder. files: their names. tensors: by name, of all files."""

    files: tuple[str, ...]
    tensors: Mapping[str, FileTensor]


def refuse_pointers(folder: Path) -> None:
    """Refuse a folder that was cloned without Git LFS, whichever of its files is a pointer.

    Raises: UsageError.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_SUFFIXES and path.is_file() and path.stat().st_size < POINTER_BYTES:
            with path.open("rb") as file:
                if file.read(len(LFS_MARK)) == LFS_MARK:
                    raise lfs_pointer(path)


def read_json(path: Path) -> dict[str, Any]:
    """A file of a model folder that must hold one JSON object.

    Raises: UsageError.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            problem(
                f"'{path.name}'",
                received=f"no JSON ({' '.join(str(error).split())[:120]})",
                expected="a JSON object",
                fix="download or save it again",
            )
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            problem(
                f"'{path.name}'",
                received=f"a JSON {type(content).__name__}",
                expected="a JSON object",
                fix="download or save it again",
            )
        )
    return content


def read_weight_files(folder: Path, explicit: str | None = None) -> WeightFiles:
    """The tensors of a model folder. explicit: the file that its configuration names, if it does.

    Raises: UsageError naming the file or the tensor that is missing, damaged or there twice.
    """
    name = explicit or _chosen(folder)
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) and not path.is_symlink():
        raise _refused(f"'{name}', which is outside the folder", "a file of the folder")
    if not path.is_file():
        raise _refused(f"no '{name}'", "the file that config.json names")
    if not name.endswith(".index.json"):
        return WeightFiles((name,), _tensors(path))
    return _read_shards(folder, name)


def _chosen(folder: Path) -> str:
    """The file that transformers reads first."""
    there = [name for name in (SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX) if (folder / name).is_file()]
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH, TORCH_INDEX)):
        if single in there and index in there and set(_placed(folder / index).values()) != {single}:
            raise _refused(
                f"'{single}' and '{index}', which names other files",
                "one or the other",
                "remove what is left of an earlier save",
            )
        if single in there or index in there:
            break
    if there:
        return there[0]
    shards = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name))
    if shards:
        raise _refused(f"{len(shards)} shards without '{SAFETENSORS_INDEX}'", "the index beside them")
    raise _refused(f"a folder without '{SAFETENSORS}' or '{TORCH}'", "weights in one of them, or shards with an index")


def _placed(index: Path) -> dict[str, str]:
    """File of each tensor, as an index has it."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise UsageError(
            problem(
                f"'{index.name}'",
                received="no weight_map of names and files",
                expected="the index of a split model",
                fix="download or save it again",
            )
        )
    return placed


def _read_shards(folder: Path, index: str) -> WeightFiles:
    placed = _placed(folder / index)
    if not isinstance(read_json(folder / index).get("metadata"), dict):  # transformers cannot do without
        raise UsageError(
            problem(
                f"'{index}'",
                received="no table 'metadata'",
                expected="one, which may be empty",
                fix='add "metadata": {} to it, or save the model again',
            )
        )
    files = sorted(set(placed.values()))
    if strange := [file for file in files if Path(file).name != file]:
        raise _refused(f"'{index}', which names '{strange[0]}'", "files of the folder")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise _refused(f"no {listed(missing)}", f"every file that '{index}' names")
    stale = sorted(
        path.name
        for path in folder.iterdir()
        if SHARD.fullmatch(path.name) and path.suffix == Path(files[0]).suffix and path.name not in files
    )
    if stale:
        raise _refused(
            f"{listed(stale)}, which '{index}' does not name",
            "the shards of one save",
            "remove what is left of an earlier save",
        )
    tensors: dict[str, FileTensor] = {}
    for file in files:
        found = _tensors(folder / file)
        lacking = sorted(name for name, where in placed.items() if where == file and name not in found)
        if lacking:
            raise _refused(f"'{file}' without {listed(lacking)}", f"what '{index}' says lies there")
        twice = sorted(name for name in found if name in tensors or placed.get(name, file) != file)
        if twice:
            raise _refused(
                f"{listed(twice)} in '{file}' and in another shard",
                "each tensor once",
                "remove what is left of an earlier save, or save again",
            )
        tensors |= found
    return WeightFiles(tuple(files), tensors)


def _tensors(path: Path) -> dict[str, FileTensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else _torch_tensors(path)


def _torch_tensors(path: Path) -> dict[str, FileTensor]:
    """Tensors of a file of ``torch.save``, read with the unpickler that makes tensors and nothing else."""
    import torch

    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception as error:  # pickle, struct, RuntimeError: whatever the bytes lead to
        raise UsageError(
            problem(
                f"weights '{path.name}'",
                received=_first_line(error),
                expected="a whole file of tensors by torch.save",
                fix="download it again, or save it as safetensors",
            )
        ) from error
    if not isinstance(content, dict) or not content:
        raise _refused(f"'{path.name}' that holds a {type(content).__name__}", "a table of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise _refused(f"'{path.name}' with '{name}', a {type(value).__name__}", "a table of tensors alone")
    return {name: torch_tensor(name, value, path.name) for name, value in content.items()}


def torch_tensor(name: str, value: Any, file: str) -> FileTensor:
    """A tensor of torch as one of a file."""
    import torch

    words = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def array() -> Any:
        held = value.detach()
        return (held.float() if held.dtype == torch.bfloat16 else held).numpy()

    dtype = words.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return FileTensor(name=name, shape=tuple(value.shape), dtype=dtype, file=file, array=array)


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _refused(received: str, expected: str, fix: str = "download or save the model again") -> UsageError:
    return UsageError(problem("weights", received=received, expected=expected, fix=fix))
