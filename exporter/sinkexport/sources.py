"""Load a Hugging Face causal LM from a local directory, a ``.gguf`` file or a Hub id."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkrt.errors import SinkError, UsageError, problem

from sinkexport.loading.origin import LoadedModel, Origin
from sinkexport.util.garbage import no_garbage_collection

if TYPE_CHECKING:
    from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer

__all__ = [
    "LoadedModel",
    "Origin",
    "load_config",
    "load_generation_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "quiet_transformers",
    "refuse_architecture",
]

LOGGER = logging.getLogger("sinkexport")
REASON_CHARACTERS = 300
"""Characters of what a library says of a model that it cannot load."""


def load_model(source: str, dtype: str = "float32") -> LoadedModel:
    """Load `source` with weights in `dtype` (``float32 | float16``).

    Raises: UsageError if there is no such model or transformers cannot load it.
    """
    import torch

    from sinkexport.loading.checkpoints.checkpoint import checkpoint_notes, load_checkpoint
    from sinkexport.loading.gguf_models.model import load_gguf
    from sinkexport.loading.tokenizers.tokenizer import source_tokenizer
    from sinkexport.loading.tokenizers.tokenizer_checks import fitted

    origin = locate(source)
    for note in checkpoint_notes(origin):
        LOGGER.warning(note)
    with no_garbage_collection(), quiet_transformers(), _readable_errors(source):  # the model's code is imported here
        config = _config(origin)
        refuse_architecture(config)
        load = load_gguf if origin.is_gguf else load_checkpoint
        model = load(origin, config, getattr(torch, dtype))
        with _readable_errors(source, "tokenizer"):
            tokenizer = source_tokenizer(origin)
            if tokenizer is not None:
                tokenizer = fitted(tokenizer, model.get_input_embeddings().weight.shape[0])
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, name=origin.name, origin=origin)


def load_tokenizer(source: str) -> SourceTokenizer | None:
    """The tokenizer of `source` alone, to the id; None for a model folder that has none: such a bundle takes ids only.

    No weights are read, so that added tokens without a row of the embedding are still there: `load_model` takes them
    out.

    Raises: UsageError as `load_model`.
    """
    from sinkexport.loading.tokenizers.tokenizer import source_tokenizer

    origin = locate(source)
    with quiet_transformers(), _readable_errors(source, "tokenizer"):
        return source_tokenizer(origin)


def load_config(source: str, *, refuse: bool = True) -> Any:
    """The configuration of `source` alone: weights need not be there.

    refuse: whether architectures that do not export are refused.

    Raises: UsageError as `load_model`.
    """
    origin = locate(source)
    with quiet_transformers(), _readable_errors(source):
        config = _config(origin)
    if refuse:
        refuse_architecture(config)
    return config


def load_generation_config(source: str) -> Any | None:
    """The ids in generation_config.json of `source`; None if there is no such file.

    Raises: UsageError if it is broken.
    """
    from sinkexport.loading.checkpoints.checkpoint import generation_ids

    origin = locate(source)
    with quiet_transformers(), _readable_errors(source):
        return None if origin.is_gguf else generation_ids(origin)


def _config(origin: Origin) -> Any:
    """transformers' configuration of a model."""
    if origin.is_gguf:
        from sinkexport.loading.gguf_models.model import gguf_config

        return gguf_config(origin)
    from sinkexport.loading.checkpoints.checkpoint import checkpoint_config

    return checkpoint_config(origin)


def locate(source: str) -> Origin:
    """Locate the model `source`: a folder, a ``.gguf`` file or an id of the Hub.

    Raises: UsageError.
    """
    from sinkexport.loading.checkpoints.loading_report import adapter_refused
    from sinkexport.loading.checkpoints.weight_files import refuse_pointers
    from sinkexport.loading.gguf_models.file import model_name

    path = Path(source)
    location: dict[str, Any]
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise _no_model(source, "no such file")
        location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        name = model_name(path)
    else:
        if path.is_dir():
            refuse_pointers(path)
        if path.is_dir() and not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise adapter_refused(source)
            raise _no_model(source, "a folder without config.json")
        if path.is_file():
            raise _no_model(source, "a file without the ending .gguf")
        if not path.is_dir() and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1):
            raise _no_model(source, "no such folder")
        location = {"pretrained_model_name_or_path": source}
        name = path.resolve().name if path.is_dir() else source
    return Origin(source=source, path=path if path.exists() else None, location=location, name=name)


def refuse_architecture(config: Any) -> None:
    """Refuse before gigabytes are read what the configuration alone rules out.

    Raises: UsageError with the reason.
    """
    from sinkexport.families import refusal_of_config

    if reason := refusal_of_config(config):
        raise UsageError(
            problem(
                "model",
                received=f"{config.model_type}, which {reason}",
                expected="a decoder-only model with rotary or ALiBi positions",
                fix="see 'sinkexport inspect families'",
            )
        )


@contextlib.contextmanager
def _readable_errors(source: str, what: str = "model") -> Iterator[None]:
    """Turn what transformers raises for a bad source (dozens of types) into one line. what: is being loaded."""
    try:
        yield
    except (SinkError, MemoryError):
        raise
    # SafetensorError, struct.error, AssertionError, TypeError, plain Exception of tokenizers ..: what the bytes of a
    # damaged file lead to has no common type.
    except Exception as error:
        if what != "model":
            received = f"that of '{source}' ({_reason(error)})"
            raise UsageError(
                problem(what, received=received, expected=f"whole {what} files", fix="download the model again")
            ) from error
        raise _no_model(source, _reason(error), is_there=Path(source).exists()) from error


def _reason(error: Exception) -> str:
    """One line of what a library says, without what a terminal would act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if re.match(r"(Class v|V)alidation error for ", lines[0]) and len(lines) > 1:  # of a config; what it is comes after
        words = lines[1].partition("Error: ")[2] or lines[1]
    elif isinstance(error, OSError | ValueError | RuntimeError | ImportError):
        words = lines[0]
    else:
        words = f"{type(error).__name__}: {lines[0]}"
    if words.endswith(":") and len(lines) > 1:
        words = f"{words} {lines[1]}"
    return "".join(c if c.isprintable() else " " for c in words)[:REASON_CHARACTERS]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or advice of other libraries on the terminal while ours is shown."""
    import transformers

    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # GGUF loading draws a bar that no setting turns off
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _no_model(source: str, reason: str, *, is_there: bool = False) -> UsageError:
    """The refusal of a source. is_there: it was found, and what is in it could not be read."""
    if (other := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", reason)) is not None:
        return UsageError(
            problem(
                "model",
                received=f"a {other[1]}, which transformers loads as no causal language model",
                expected="a decoder-only language model",
                fix="see 'sinkexport inspect families'",
            )
        )
    expected, fix = "a model folder, a .gguf file or a Hub id", "check the path or the network"
    if is_there and (Path(source) / "config.json").is_file():
        expected, fix = "one that transformers can load", "check what its config.json says, or download it again"
    elif is_there and Path(source).is_file():
        expected, fix = "a whole .gguf file of a known architecture", "download it again"
    return UsageError(problem("model", received=f"'{source}' ({reason})", expected=expected, fix=fix))
