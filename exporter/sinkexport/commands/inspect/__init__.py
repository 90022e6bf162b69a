"""``sinkexport inspect``: what a bundle holds, what a model has, which families, recipes and CPU library there are."""

from __future__ import annotations

from pathlib import Path

import click
from sinkrt.contract import MANIFEST_NAME, load_manifest
from sinkrt.contract.constants import CPU
from sinkrt.errors import UsageError, problem

from sinkexport.config import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_SIZE, ExportConfig


@click.command(name="inspect")
@click.argument("what", metavar="DIR|MODEL|FILE|families|recipes|cpu")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: manifest, model, families, recipes or cpu.")
@click.option(
    "--tokenizer-out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a model's tokenizer into DIR, as a bundle would hold it.",
)
@click.option(
    "--memory",
    is_flag=True,
    help="Memory that decoding takes: of the bundle DIR, or of a model that is not exported yet: a folder "
    "with config.json, a .gguf file or a Hub id.",
)
@click.option(
    "--window",
    "windows",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="W",
    help=f"With --memory of a model: window size; may be repeated.  [default: {DEFAULT_WINDOW_SIZE}]",
)
@click.option(
    "--sink-tokens",
    type=click.IntRange(min=0),
    metavar="S",
    help=f"With --memory of a model.  [default: {DEFAULT_NUM_SINK_TOKENS}]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="B",
    help=f"With --memory of a model.  [default: {ExportConfig.batch}]",
)
def command(
    what: str,
    as_json: bool,
    tokenizer_out: Path | None,
    memory: bool,
    windows: tuple[int, ...],
    sink_tokens: int | None,
    batch: int | None,
) -> None:
    """Show the bundle DIR, what an export of MODEL (a folder, a .gguf file or a Hub id) would read and refuse, a
    calibration FILE, the table of model families or that of quantisation recipes, or the CPU library that is used here.
    """
    if tokenizer_out is not None:
        _write_tokenizer(what, tokenizer_out, "--memory or --json" if memory or as_json else None)
        return
    has_geometry = bool(windows) or sink_tokens is not None or batch is not None
    if memory:
        if _is_families(what) or _is_recipes(what) or _is_cpu(what):
            raise UsageError(
                problem("--memory", received=f"'{what}'", expected="a bundle or a model", fix="leave it out")
            )
        from sinkexport.commands.inspect.memory import show_memory_of_bundle, show_memory_of_model

        if Path(what, MANIFEST_NAME).exists():
            if has_geometry:
                raise _refused_geometry(f"with the bundle '{what}'", "a model: a bundle has its own", "leave them out")
            show_memory_of_bundle(Path(what), as_json)
            return
        show_memory_of_model(
            what,
            windows or (DEFAULT_WINDOW_SIZE,),
            DEFAULT_NUM_SINK_TOKENS if sink_tokens is None else sink_tokens,
            batch or ExportConfig.batch,
            as_json,
        )
        return
    if has_geometry:
        raise _refused_geometry("without --memory", "--memory", "add it, or leave them out")
    _show(what, as_json)


def _show(what: str, as_json: bool) -> None:
    """Find out what is meant, and show it.

    Raises: UsageError if there is no such thing.
    """
    path = Path(what)
    if _is_families(what):
        from sinkexport.commands.inspect.tables import show_families

        show_families(as_json)
    elif _is_recipes(what):
        from sinkexport.commands.inspect.tables import show_recipes

        show_recipes(as_json)
    elif _is_cpu(what):
        from sinkexport.commands.inspect.cpu import show_cpu_library

        show_cpu_library(as_json)
    elif _is_model(what):
        from sinkexport.commands.inspect.model import show_model

        show_model(what, as_json)
    elif not path.exists():
        raise UsageError(
            problem(
                "inspect",
                received=f"'{what}', which is not there",
                expected="a bundle, a model (a folder, a .gguf file or a Hub id), a calibration file, "
                "families, recipes or cpu",
                fix="check the path",
            )
        )
    elif path.is_file():
        from sinkexport.commands.inspect.calibration import show_calibration

        show_calibration(path, as_json)
    else:
        from sinkexport.commands.inspect.bundle import show_bundle

        manifest = load_manifest(path)
        if as_json:
            click.echo(manifest.to_json(), nl=False)
        else:
            show_bundle(path, manifest)


def _write_tokenizer(what: str, out: Path, other_option: str | None) -> None:
    """Write a model's tokenizer. other_option: what must not be given with it.

    Raises: UsageError.
    """
    if other_option is not None or not _is_model(what):
        raise UsageError(
            problem(
                "--tokenizer-out",
                received=other_option or f"'{what}', which is no model",
                expected="a model, and no other option",
                fix="leave it out",
            )
        )
    from sinkexport.commands.inspect.model import write_tokenizer_of

    write_tokenizer_of(what, out)


def _refused_geometry(received: str, expected: str, fix: str) -> UsageError:
    return UsageError(problem("--window, --sink-tokens, --batch", received=received, expected=expected, fix=fix))


def _is_families(what: str) -> bool:
    """Whether the table is meant, and no folder or file of that name."""
    return what == "families" and not Path(what).exists()


def _is_cpu(what: str) -> bool:
    """Whether the CPU library is meant, and no folder or file of that name."""
    return what == CPU and not Path(what).exists()


def _is_recipes(what: str) -> bool:
    """Whether the table is meant: this repository has a folder of that name, which is no bundle."""
    return what == "recipes" and not Path(what, MANIFEST_NAME).exists()


def _is_model(what: str) -> bool:
    """Whether this is a .gguf file, a folder with config.json that is no bundle, or looks like an id of the Hub."""
    path = Path(what)
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / MANIFEST_NAME).exists()
    if path.suffix.lower() == ".gguf":
        return True
    return not path.exists() and what.count("/") == 1 and not what.startswith((".", "~", "/"))
