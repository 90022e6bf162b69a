"""What becomes of a tiny model of a family: exact, refused, not built, or a fault."""

from __future__ import annotations

import dataclasses
import gc
import re
import shutil
import warnings
from pathlib import Path

import torch
import transformers

from tests.families.shrink import MAX_PARAMETERS, OVERRIDES, tiny_config
from tests.support import run_cli

EXACT, REFUSED, NOT_BUILT, FAULT = "exact", "refused", "not built", "fault"
NUM_SINKS, WINDOW, CHUNK = 2, 16, 4
FIXED = ("A_log", "dt_bias", "dt_proj.bias")
"""Parameters that stay as the model begins: random ones make recurrences that grow without bound."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """State of a family, and the reason in a line; empty where it is exact."""

    state: str
    reason: str = ""


class NotBuiltError(Exception):
    """There is no tiny model of the family."""


def outcome_of(model_type: str, folder: Path) -> Outcome:
    """Make a tiny random model of the family, export and verify it, in this process by the command line.

    folder: where the model and the bundle lie meanwhile.
    """
    model, bundle = folder / "model", folder / "bundle"
    try:
        write_model(model_type, model)
    except NotBuiltError as error:
        return Outcome(NOT_BUILT, str(error))
    try:
        return _exported(model, bundle)
    finally:
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(bundle, ignore_errors=True)
        gc.collect()


def write_model(model_type: str, folder: Path) -> None:
    """Save a tiny random model with finite logits. Raises: NotBuiltError."""
    if (reason := OVERRIDES.get(model_type, {}).get("not_built")) is not None:
        raise NotBuiltError(reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = tiny_config(model_type)
            with torch.device("meta"):  # sizes first: defaults of some families have billions of parameters
                size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
            if size > MAX_PARAMETERS:
                raise NotBuiltError(f"{size / 1e6:.0f}M parameters are left")
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            _randomize(model)
            with torch.no_grad():
                logits = model(input_ids=torch.arange(12)[None] + 3).logits
            if not logits.isfinite().all():
                raise NotBuiltError("its logits are not finite")
            model.save_pretrained(folder)
    except NotBuiltError:
        raise
    except Exception as error:  # a family's code fails in any way where its configuration does not fit
        raise NotBuiltError(f"{type(error).__name__}: {one_line(str(error))}") from error


def _randomize(model: torch.nn.Module) -> None:
    """Parameters large enough that a wrong step shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or name.endswith(FIXED):
                continue
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _exported(model: Path, bundle: Path) -> Outcome:
    sizes = ("--sink-tokens", NUM_SINKS, "--window", WINDOW, "--chunk", CHUNK)
    done = run_cli("export", model, "-o", bundle, *sizes)
    if done.code == 2 and len(done.err.splitlines()) == 1:
        return Outcome(REFUSED, one_line(done.err))
    if done.code:
        return Outcome(FAULT, f"export ends with {done.code}: {one_line(done.err)}")
    done = run_cli("verify", bundle, "--against", model)
    if done.code:
        return Outcome(FAULT, f"verify ends with {done.code}: {one_line(done.err)}")
    return Outcome(EXACT)


def one_line(text: str) -> str:
    """The last line of a text that says something, without paths of this machine."""
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return re.sub(r"/\S*/", "", line.strip().removeprefix("sinkexport: error: "))[:400]
