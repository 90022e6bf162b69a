"""Facts of a GGUF file about its model, read so that no key is ignored."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.gguf_models.file import GgufFile

WITHOUT_EFFECT: Mapping[str, str] = {
    "general.": "names, licences, sources and settings of samplers; the architecture and alignment are read apart",
    "tokenizer.": "text to ids and back: the tokenizer's part",
    "split.": "how the file was split: checked where the parts are read",
    "quantize.": "how the weights were quantised; they lie in the file as they are",
    "imatrix.": "what the quantisation was measured on",
}
"""Beginnings of keys that change no logit, and why."""

REFUSED_BEGINNINGS: Mapping[str, str] = {
    "adapter.": "an adapter, which is no model of its own",
    "clip.": "a vision or audio encoder",
    "diffusion.": "a model that denoises text",
    "xielu.": "an activation function with constants of its own",
}

OF_ONE_ARCHITECTURE: Mapping[str, str] = {
    "context_length": "how long texts were in training: nothing here depends on it",
    "rope.scaling.finetuned": "whether the scaling was trained",
    "tensor_data_layout": "a name of the layout that the architecture always has",
    "pooling_type": "how embeddings of texts are made; logits are not",
}
"""Keys behind the architecture's name that change no logit, unless the architecture reads them, and why."""

ONLY_AS: Mapping[str, tuple[Any, str]] = {
    "attention.causal": (True, "tokens that see later ones cannot be streamed"),
    "expert_count": (0, "the architecture has no experts"),
    "expert_used_count": (0, "the architecture has no experts"),
    "nextn_predict_layers": (0, "layers that draft"),
    "attention.sliding_window": (0, "the architecture has no windows"),
}
"""The value with which a key changes nothing, unless the architecture reads it, and why there must be no other."""

MAX_COUNT = 1 << 20
"""No count of layers, heads, experts or columns is larger."""

MAX_LENGTH = 1 << 31
"""No text is longer, in tokens."""


def refused(what: str, expected: str, fix: str = "use a file that llama.cpp's converter wrote") -> UsageError:
    """An error about a GGUF model: what it has that cannot be read exactly, and what could be."""
    return UsageError(problem("model", received=what, expected=expected, fix=fix))


class Facts:
    """Metadata and tensors of a file.

    Each getter marks its key as read; `expect_all_read` refuses the keys that are left.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tensors = file.tensors
        self._read: set[str] = set()
        self.num_layers = self.count("block_count")
        self._check_layers()

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return self.file.architecture

    @property
    def context_length(self) -> int:
        """Length of texts in training, in tokens; a very large number where the file does not say."""
        return self.count("context_length", MAX_COUNT, most=MAX_LENGTH)

    def value(self, key: str) -> Any:
        """The raw value of ``{arch}.key``, None if it is absent; one value for all layers if each has the same."""
        full = f"{self.architecture}.{key}"
        self._read.add(full)
        value = self.file.metadata.get(full)
        if isinstance(value, list) and key in _PER_LAYER:
            if not value:
                raise refused(f"'{full}' with no values", "one value, or one for each layer")
            if any(other != value[0] for other in value):
                raise refused(f"'{full}' with another value in each layer ({value[:4]} ..)", "the same in every layer")
            return value[0]
        return value

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = MAX_COUNT) -> int:
        """A whole number from `least` to `most`; it must be there unless there is a default."""
        value = self.value(key)
        if value is None:
            if default is None:
                raise refused(f"no key '{self.architecture}.{key}'", "the model's metadata")
            return default
        if type(value) is not int or not least <= value <= most:
            raise refused(f"'{self.architecture}.{key}' = {value!r:.40}", f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number, float32 as it lies in the file but with the digits that it was written with."""
        value = self.value(key)
        if value is None:
            if default is None:
                raise refused(f"no key '{self.architecture}.{key}'", "the model's metadata")
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or (positive and value <= 0):
            raise refused(f"'{self.architecture}.{key}' = {value!r:.40}", "a finite number" + " above 0" * positive)
        return shortest(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.value(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise refused(f"'{self.architecture}.{key}' = {value!r:.40}", "true or false")
        return value

    def expect(self, key: str, allowed: Any, why: str) -> None:
        """Refuse a key that has any other value than `allowed`; absent is as good."""
        value = self.value(key)
        if value is not None and value != allowed:
            raise refused(f"'{self.architecture}.{key}' = {value!r:.40}", f"{allowed!r} ({why})")

    def has(self, tensor: str) -> bool:
        """Whether there is such a tensor; ``{i}`` in its name: in any layer."""
        if "{i}" not in tensor:
            return tensor in self.tensors
        return any(tensor.format(i=layer) in self.tensors for layer in range(self.num_layers))

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor, rows first; it must be there."""
        if tensor not in self.tensors:
            raise refused(f"no tensor '{tensor}'", "all tensors of the model")
        return tuple(int(size) for size in reversed(self.tensors[tensor].shape))

    def vocab_size(self) -> int:
        """Rows of the embedding, which must be those of the metadata and as many as there are tokens."""
        rows = self.shape("token_embd.weight")[0]
        stated = self.value("vocab_size")
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        for what, size in (("vocab_size", stated), ("tokens", len(tokens) if isinstance(tokens, list) else None)):
            if size is not None and size != rows:
                raise refused(f"{size} {what} for 'token_embd.weight' of {rows} rows", f"{rows}")
        return rows

    def expect_all_read(self) -> None:
        """Refuse a key that nobody has read and that is not known to be without effect."""
        import gguf

        own = f"{self.architecture}."
        for key, (allowed, why) in ONLY_AS.items():
            if own + key not in self._read:
                self.expect(key, allowed, why)
        others = {f"{name}." for name in gguf.MODEL_ARCH_NAMES.values()} - {own}
        harmless = tuple(WITHOUT_EFFECT)
        for key, value in self.file.metadata.items():
            if key in self._read or key.startswith(harmless):
                continue
            if key.startswith(own) and key.removeprefix(own) in OF_ONE_ARCHITECTURE:
                continue
            reason = next((why for start, why in REFUSED_BEGINNINGS.items() if key.startswith(start)), None)
            if reason is not None:
                raise refused(f"'{key}' = {value!r:.40}, of {reason}", "a text model", "name the model's own file")
            if key.startswith(own) or any(key.startswith(other) for other in others):
                raise refused(
                    f"'{key}' = {value!r:.60}, whose effect on '{self.architecture}' is not known here",
                    "only keys that this architecture is known by",
                )
            # What is left is in the name space of another tool: the model's own is called like its architecture.

    def _check_layers(self) -> None:
        """Refuse a number of layers that is not that of the tensors: before anything is built with it."""
        layers = {int(match[1]) for name in self.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
        if layers != set(range(self.num_layers)):
            there = f"{len(layers)} layers" + (f" up to {max(layers)}" if layers else "")
            raise refused(
                f"'{self.architecture}.block_count' = {self.num_layers} and tensors of {there}",
                "tensors of every layer",
                "download the whole model again",
            )


_PER_LAYER = {
    "attention.head_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "expert_used_count",
    "expert_feed_forward_length",
}


def shortest(value: float) -> float:
    """The decimal of fewest digits that is this float32: 1e-5 where the file has 9.999999747378752e-06.

    Configurations hold the former; both are the same number in float32.
    """
    import numpy as np

    single = np.float32(value)
    return float(str(single)) if float(single) == value else float(value)
