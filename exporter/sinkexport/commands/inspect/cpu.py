"""Show the CPU library (plugins/cpu) that bundles of ``--target cpu`` run on here."""

from __future__ import annotations

import json
import os

import click
from sinkrt.backends.cpu_library import checked_library, instruction_set
from sinkrt.contract import CPU_ABI
from sinkrt.contract.constants import CPU_ISA_VARIABLE, CPU_LIBRARY_VARIABLE
from sinkrt.errors import BackendError


def show_cpu_library(as_json: bool) -> None:
    """Print where it is, its version and the instruction set that it uses; or why there is none.

    Raises: BackendError if the environment names a library or an instruction set that does not serve.
    """
    try:
        path = checked_library()
    except BackendError as error:
        if os.environ.get(CPU_LIBRARY_VARIABLE) or os.environ.get(CPU_ISA_VARIABLE):
            raise
        facts = {"library": None, "version": CPU_ABI, "isa": None, "problem": str(error)}
    else:
        facts = {"library": str(path), "version": CPU_ABI, "isa": instruction_set(path), "problem": None}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(facts["problem"] or "CPU library: {library}, version {version}, {isa}".format_map(facts))
