"""Options that several commands share, declared once, and options that answer to a former name as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from sinkrt.backends import BACKENDS
from sinkrt.errors import UsageError, problem

Function = TypeVar("Function", bound=Callable[..., Any])

MODEL_SOURCES = "a local directory, a .gguf file or a Hub id"
"""What names a model, for help texts."""
MAX_SEED = 2**63 - 1
"""Largest seed of NumPy's generator that every platform takes."""


class RenamedOption(click.Option):
    """An option that also answers to its former name, which help does not show. former: kept for one version."""

    def __init__(self, param_decls: Sequence[str] | None = None, *, former: str, **attributes: Any) -> None:
        super().__init__(param_decls, **attributes)
        self.former = former

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Register both names; the former one takes a value too."""
        super().add_to_parser(parser, ctx)
        parser.add_option(obj=self, opts=[self.former], dest=self.name, action="store", nargs=self.nargs)


def file_option(*names: str, **attributes: Any) -> Callable[[Function], Function]:
    """Declare an option that names a file. names, attributes: as of `click.option`."""
    return click.option(*names, type=click.Path(path_type=Path), **{"metavar": "FILE", **attributes})


def number_option(
    name: str, default: float, about: str, *, metavar: str = "N", **attributes: Any
) -> Callable[[Function], Function]:
    """Declare an option that takes a number and shows its default. attributes: as of `click.option`."""
    attributes = {"type": type(default), **attributes}
    return click.option(name, default=default, show_default=True, metavar=metavar, help=about, **attributes)


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path), metavar="DIR")


def backend_option(function: Function) -> Function:
    """Add ``--backend``, one of the runtime's backends."""
    return click.option(
        "--backend", type=click.Choice(BACKENDS), default=BACKENDS[0], show_default=True, help="What computes."
    )(function)


def threads_option(function: Function) -> Function:
    """Add ``--threads``, None for all physical cores."""
    return click.option(
        "--threads",
        type=int,
        metavar="N",
        callback=_at_least_one,
        help="CPU threads.  [default: all physical cores]",
    )(function)


def speculate_option(about: str) -> Callable[[Function], Function]:
    """Add ``--speculate``, what guesses tokens."""
    return click.option("--speculate", metavar="ngram|draft:DIR", help=about)


def json_option(about: str = "Write the report as JSON too.", **attributes: Any) -> Callable[[Function], Function]:
    """Add ``--json FILE`` as the argument `json_file`."""
    return file_option("--json", "json_file", help=about, **attributes)


def plot_option(about: str, **attributes: Any) -> Callable[[Function], Function]:
    """Add ``--plot FILE`` as the argument `plot_file`."""
    return file_option("--plot", "plot_file", help=about, **attributes)


def text_option(
    about: str = "UTF-8 text like that which the model will stream.",
    *,
    required: bool = True,
) -> Callable[[Function], Function]:
    """Add ``--text FILE`` as the argument `text_file`."""
    return file_option("--text", "text_file", required=required, help=about)


def output_option(about: str) -> Callable[[Function], Function]:
    """Add ``-o FILE``, where a command writes its result."""
    return file_option("-o", "--output", required=True, help=about)


def random_ids_option(function: Function) -> Function:
    """Add ``--seed`` of random ids."""
    return click.option(
        "--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Seed of the random ids."
    )(function)


def template_arg_option(scope: str) -> Callable[[Function], Function]:
    """Add ``--template-arg`` as the argument `template_args`. scope: for which chats, in words."""
    return click.option(
        "--template-arg",
        "template_args",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Set a variable of the chat template, e.g. enable_thinking=false{scope}. VALUE is read as JSON where it "
        "is JSON, else as text; may be repeated.  [default: the template's own]",
    )


def allow_special_option(texts: str, scope: str = "") -> Callable[[Function], Function]:
    """Add ``--allow-special``. texts: whose they are, in words. scope: for which requests, in words."""
    return click.option(
        "--allow-special",
        is_flag=True,
        help=f"Let names of special tokens in {texts}, such as <|im_end|>, become those tokens{scope}.  "
        "[default: they stay ordinary text]",
    )


def refuse_same_file(files: Mapping[str, Path | None]) -> None:
    """Refuse an output that would overwrite another one. files: by the option that names them.

    Raises: UsageError.
    """
    options: dict[Path, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        if (first := options.setdefault(file.resolve(), option)) != option:
            received = f"'{file}', as {first}"
            raise UsageError(
                problem(option, received=received, expected="a file of its own", fix="choose another path")
            )


def refuse_given(ctx: click.Context, names: Sequence[str], **error: str) -> None:
    """Refuse options that would be ignored. names: of arguments. error: received, expected and fix.

    Raises: UsageError that names the first one that was given.
    """
    for name in names:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise UsageError(problem("--" + name.replace("_", "-"), **error))


def _at_least_one(_ctx: click.Context, option: click.Parameter, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(
            problem(f"--{option.name}", received=value, expected=">= 1", fix="give a larger number, or leave it out")
        )
    return value


def not_negative(_ctx: click.Context, option: click.Parameter, value: int) -> int:
    """Refuse a negative number under the option's own name and unit: a callback of options.

    Raises: UsageError.
    """
    if value < 0:
        raise UsageError(problem(option.opts[0], received=value, expected=">= 0", fix="raise it"))
    return value
