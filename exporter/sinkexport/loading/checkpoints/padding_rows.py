"""Rows of embeddings that transformers writes over as it loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sinkexport.loading.checkpoints.file_tensor import FileTensor


def restore_padding_rows(model: Any, tensors: Mapping[str, FileTensor]) -> None:
    """Give the rows of padding tokens the numbers of the file.

    A class of transformers 5.23 (Youtu) sets the row to zeros after the weights are loaded. Where the output projection
    shares the embedding, the padding token's logit is 0 then. tensors: those of the file, by name.
    """
    import torch

    for name, module in model.named_modules():
        tensor = tensors.get(f"{name}.weight")
        if not isinstance(module, torch.nn.Embedding) or module.padding_idx is None or tensor is None:
            continue
        row = torch.from_numpy(np.array(tensor.rows(np.array([module.padding_idx]))[0], np.float32))
        with torch.no_grad():
            module.weight[module.padding_idx] = row.to(module.weight.dtype)
