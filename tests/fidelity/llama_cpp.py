"""llama.cpp's own tokenizer, by the C functions that the wheel of xllamacpp exports: the reference for vocabularies."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from types import TracebackType


class _ModelParams(ctypes.Structure):
    """``llama_model_params`` as of 2026-10; `rest` is more than what follows."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("buffer_types", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress", ctypes.c_void_p),
        ("progress_data", ctypes.c_void_p),
        ("overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("rest", ctypes.c_bool * 15),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("*.so"))))
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    for name, result, arguments in (
        ("llama_model_default_params", _ModelParams, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _ModelParams]),
        ("llama_model_free", None, [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_tokenize", integer, [pointer, ctypes.c_char_p, integer, ctypes.POINTER(integer), integer, flag, flag]),
        ("llama_vocab_n_tokens", integer, [pointer]),
        ("llama_vocab_is_eog", flag, [pointer, integer]),
        ("llama_log_set", None, [_Log, pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.quiet = _Log(lambda level, text, data: None)
    library.llama_log_set(library.quiet, None)
    return library


class LlamaVocabulary:
    """The vocabulary of a GGUF file, tensors or not; a context manager."""

    def __init__(self, path: Path) -> None:
        self._library = _library()
        params = self._library.llama_model_default_params()
        params.vocab_only = True
        self._model = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path.name}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaVocabulary:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._library.llama_model_free(self._model)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = self._library.llama_tokenize(
            self._vocabulary, data, len(data), ids, len(ids), add_special, parse_special
        )
        assert count >= 0, text
        return ids[:count]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a generation."""
        count = self._library.llama_vocab_n_tokens(self._vocabulary)
        return tuple(index for index in range(count) if self._library.llama_vocab_is_eog(self._vocabulary, index))
