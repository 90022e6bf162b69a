"""The check of an export's weights: what to compare a bundle with, and what must be accounted for in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from sinkrt.errors import UsageError

from sinkexport.loading.checkpoints.file_tensor import FileTensor, Floats, QuantizedFileTensor
from sinkexport.loading.checkpoints.no_effect import why_no_effect
from sinkexport.loading.checkpoints.weight_files import listed, torch_tensor
from sinkexport.loading.weights.derived_weights import claim_derived
from sinkexport.loading.weights.graph_weights import GraphMatrix, read_graph
from sinkexport.loading.weights.latent_weights import whole_latent_matrices
from sinkexport.loading.weights.weight_check import WeightCheck
from sinkexport.loading.weights.weight_refusals import differs, refuse_strangers, unclaimed
from sinkexport.loading.weights.weight_roles import LLAMA_ORDER, rows_of_halves
from sinkexport.loading.weights.weight_rounding import Rounding
from sinkexport.util.derived_constant import DerivedConstant

if TYPE_CHECKING:
    from sinkexport.config import ExportConfig
    from sinkexport.loading.gguf_models.file import GgufFile
    from sinkexport.loading.origin import LoadedModel

FREQUENCIES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of GGUF files that are read for the rotation, whose tables the probe has."""


def check_weights(
    folder: Path,
    files: Sequence[str],
    loaded: LoadedModel,
    config: ExportConfig,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    derived: Sequence[DerivedConstant] = (),
    unread: Callable[[], Collection[str]] = frozenset,
) -> None:
    """Compare the graphs of a bundle with the file that the model came from, or, if it was made in memory, with the
    model itself.

    files: the ONNX files of `folder`; the others share the first one's weights. derived: constants that the model's
    code computes. unread: names of parameters that the model's code does not read; asked for if there are
    tensors that the graph lacks.

    Raises: UsageError naming a tensor whose numbers are not in the graph, or a constant that is not of the file.
    """
    model, is_gguf = loaded.model, loaded.origin is not None and loaded.origin.is_gguf
    tensors = source_tensors(loaded)
    check = WeightCheck(
        tensors,
        _shapes(model),
        _tied(model),
        _rounding(model, config, num_kv_heads),
        model.base_model_prefix,
        is_gguf=is_gguf,
    )
    first = whole_latent_matrices(read_graph(folder / files[0]))
    left = [t for t in check.compare(first) if t.name not in FREQUENCIES and why_no_effect(t, model) is None]
    left = claim_derived(check, left, tensors, derived, first)
    if left:
        left = _read_ones(check, left, unread())
    if left:
        others = f", nor are {len(left) - 1} others: {listed([t.name for t in left[1:]])}" if len(left) > 1 else ""
        raise differs(left[0], f"it is nowhere in the graph{others}")
    refuse_strangers(unclaimed(first, check.parameters, num_q_heads), "constants of the graph")
    foreign = sum(name not in check.parameters for name in check.folded)
    absent = [name for name in check.parameters if name not in check.accounted]
    if len(absent) > foreign:
        refuse_strangers(absent, "parameters of the model")
    for file in files[1:]:
        matrices = whole_latent_matrices(read_graph(folder / file))
        claim_derived(check, [], tensors, derived, matrices)
        _compare_shared(check, matrices, first, num_q_heads)


def _read_ones(check: WeightCheck, left: Sequence[FileTensor], unread: Collection[str]) -> list[FileTensor]:
    """Tensors that are left without those of parameters that nothing reads, which then are accounted for."""
    read = []
    for tensor in left:
        names = set(check.names_of(tensor.name)) & set(unread)
        for name in names:
            check.account(name)
        read += [] if names else [tensor]
    return read


def _compare_shared(
    check: WeightCheck, matrices: Sequence[GraphMatrix], first: Sequence[GraphMatrix], num_q_heads: int
) -> None:
    """Constants of another graph must be those of the first, or of the file themselves."""
    names = {matrix.name: matrix for matrix in first}
    contents: dict[bytes, list[GraphMatrix]] = {}
    for matrix in first:
        if matrix.is_small:
            contents.setdefault(matrix.content, []).append(matrix)
    own = []
    for matrix in matrices:
        twin = names.get(matrix.name)
        if twin is not None and matrix.parts and matrix.is_same(twin):
            continue
        alike = contents.get(matrix.content, []) if matrix.is_small else []
        if not any(one.layers[0] <= matrix.layers[1] and matrix.layers[0] <= one.layers[1] for one in alike):
            own.append(matrix)
    check.compare(own)
    refuse_strangers(unclaimed(own, check.parameters, num_q_heads), "constants of the prefill graph")


def source_tensors(loaded: LoadedModel) -> Mapping[str, FileTensor]:
    """The tensors of the file that a model came from; of the model itself if it was made in memory.

    Raises: UsageError if the file is damaged.
    """
    origin = loaded.origin
    if origin is None:
        parameters = loaded.model.named_parameters()
        return {name: torch_tensor(name, parameter, "the model") for name, parameter in parameters}
    if origin.is_gguf and origin.path is not None:
        from sinkexport.loading.gguf_models.file import open_gguf

        return gguf_tensors(open_gguf(origin.path))
    from sinkexport.loading.checkpoints.checkpoint import weights_folder
    from sinkexport.loading.checkpoints.weight_files import read_weight_files
    from sinkexport.loading.stored.folder import quantization_of, with_stored

    explicit, folder = getattr(loaded.model.config, "transformers_weights", None), weights_folder(origin)
    return with_stored(read_weight_files(folder, explicit).tensors, quantization_of(folder))


def gguf_tensors(file: GgufFile) -> dict[str, FileTensor]:
    """The tensors of a GGUF file, queries and keys in the order that Hugging Face's files have."""
    found = raw_gguf_tensors(file)
    for name in found:
        heads = {"attn_q": "{arch}.attention.head_count", "attn_k": "{arch}.attention.head_count_kv"}
        key = next((key for part, key in heads.items() if f".{part}." in name), None)
        if key is None or file.architecture not in LLAMA_ORDER:
            continue
        count = file.get(key, file.get(heads["attn_q"]))
        rows = found[name].matrix_shape[0]
        if isinstance(count, int) and count > 0 and rows % (2 * count) == 0:
            found[name] = found[name].reordered(rows_of_halves(count, rows))
    return found


def raw_gguf_tensors(file: GgufFile) -> dict[str, FileTensor]:
    """The tensors of a GGUF file, their rows as they lie there."""
    return {name: _gguf_tensor(name, tensor) for name, tensor in file.tensors.items()}


def _gguf_tensor(name: str, tensor: Any) -> FileTensor:
    import gguf

    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind, data = tensor.tensor_type, tensor.data
    if kind == gguf.GGMLQuantizationType.BF16:
        return FileTensor(
            name=name,
            shape=shape,
            dtype="BF16",
            file="the file",
            array=lambda: data.view(ml_dtypes.bfloat16).reshape(shape),
        )
    if data.dtype != np.uint8:
        return FileTensor(name=name, shape=shape, dtype=kind.name, file="the file", array=lambda: data.reshape(shape))
    block = gguf.GGML_QUANT_SIZES[kind]
    return QuantizedFileTensor(
        name=name,
        shape=shape,
        dtype=kind.name,
        file="the file",
        array=lambda: data,
        block=block,
        dequantize=lambda rows: gguf.dequantize(rows, kind),
    )


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def _tied(model: Any) -> list[frozenset[str]]:
    """Names that share a parameter."""
    holders: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), set()).add(name)
    return [frozenset(names) for names in holders.values()]


def _rounding(model: Any, config: ExportConfig, num_kv_heads: int) -> Rounding:
    """Rounding that the export was asked for."""
    recipe, calibration = config.recipe, config.calibration
    weights = None if recipe is None else recipe.weights
    nearest = weights is None or (weights.scales, weights.rounding) == ("absmax", "nearest")
    divisors: dict[str, Floats] = {}
    if recipe is not None and recipe.smooth is not None and calibration is not None:
        for name, _module in model.named_modules():
            with contextlib.suppress(UsageError):  # of what is no matmul
                if (found := calibration.divisors(name)) is not None:
                    divisors[name] = np.asarray(found, np.float32)
    return Rounding(
        half=config.dtype == "fp16",
        nearest=nearest,
        exact=recipe is not None and recipe.stored == "keep",
        divisors=divisors,
        num_kv_heads=num_kv_heads,
    )
