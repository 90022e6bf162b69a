"""Quantised tensors of the source of a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkexport.loading.checkpoints.file_tensor import QuantizedFileTensor
from sinkexport.loading.checkpoints.weight_files import read_weight_files
from sinkexport.loading.stored.folder import quantization_of, with_stored
from sinkexport.loading.stored.gguf_blocks import gguf_tensor
from sinkexport.loading.stored.tensors import ComputedTensor

if TYPE_CHECKING:
    from sinkexport.loading.origin import LoadedModel


def is_quantized_folder(loaded: LoadedModel) -> bool:
    """Whether a model came from a folder of quantised weights."""
    origin = loaded.origin
    if origin is None or origin.is_gguf or origin.path is None:
        return False
    return quantization_of(origin.path) is not None


def quantized_tensors(loaded: LoadedModel) -> list[ComputedTensor]:
    """The quantised tensors of the folder or the GGUF file that a model came from; none of any other source.

    Raises: UsageError if a file is damaged.
    """
    origin = loaded.origin
    if origin is None or origin.path is None:
        return []
    if origin.is_gguf:
        from sinkexport.loading.gguf_models.file import open_gguf
        from sinkexport.loading.weights.check_weights import raw_gguf_tensors

        raw = raw_gguf_tensors(open_gguf(origin.path)).values()
        return [gguf_tensor(tensor) for tensor in raw if isinstance(tensor, QuantizedFileTensor)]
    explicit = getattr(loaded.model.config, "transformers_weights", None)
    tensors = with_stored(read_weight_files(origin.path, explicit).tensors, quantization_of(origin.path))
    return [tensor for tensor in tensors.values() if isinstance(tensor, ComputedTensor)]
