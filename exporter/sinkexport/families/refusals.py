"""Whatever goes wrong while a model's own code runs is a refusal: of that family, at that step."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from sinkrt.errors import SinkError, UsageError, problem

MAX_TEXT = 300
"""Characters of an error's text that a refusal repeats; some of torch's go on for pages."""


@contextlib.contextmanager
def refusing(model: Any, step: str) -> Iterator[None]:
    """Run code of `model` as `step`, such as "tracing the decode graph".

    A family that is not understood fails in any way: in its own code, in the tracer or in the converter, none of
    which is a fault of this program. What the tracer prints meanwhile, whole graphs, is dropped, and so are
    transformers' warnings.

    Raises: UsageError that names the family, the step and the error, or says that the model's own code fails by itself.
        Errors of this project, a lack of memory and what is no `Exception` pass through.
    """
    try:
        with (
            _quiet_transformers(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    except (SinkError, MemoryError):
        raise
    except Exception as error:
        received = f"{type(error).__name__} while {step} ({one_line(error)})"
        expected = "a model whose code can be followed, see 'sinkexport inspect families'"
        fix = "it cannot be exported exactly; 'sinkexport --debug ..' shows where it failed"
        if not _runs(model):
            received += ", and when transformers runs it"
            expected = "a model that transformers can run"
            fix = "check what its config.json says, or use another release of transformers"
        problem_found = problem(f"model family '{family(model)}'", received=received, expected=expected, fix=fix)
        raise UsageError(problem_found) from error


def _runs(model: Any) -> bool:
    """Whether a model as it is computes logits of two tokens of id 0. What is no module is taken to."""
    if not isinstance(model, torch.nn.Module):
        return True
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64), position_ids=torch.arange(2)[None], use_cache=False)
    except Exception:  # of any family's own code
        return False
    return True


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its warnings go to the stderr of when it was imported: rerouted attention has some for each call."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def family(model: Any) -> str:
    """transformers' name of a model's family, or its class."""
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or type(model).__name__)


def one_line(error: BaseException) -> str:
    """The first line of an error's text that says something, cut short."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = next((line for line in lines if line), "no message")
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 2] + ".."
