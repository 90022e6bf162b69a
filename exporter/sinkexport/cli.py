"""The command line: ``sinkexport``. A command's module is imported when it is called: `run` never imports torch."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click
from sinkrt.errors import SinkError, UsageError, printable, problem

from sinkexport import __version__

if TYPE_CHECKING:
    from typing_extensions import Buffer

COMMANDS = {
    "export": "Turn a Hugging Face model into a bundle.",
    "calibrate": "Find the ranges of a model's activations for a recipe.",
    "build": "Build TensorRT engines of a bundle.",
    "run": "Stream text from a bundle, forever if you like.",
    "verify": "Compare a bundle with its model.",
    "eval": "Streaming perplexity over a long text, with a plot.",
    "bench": "Measure speed and memory of a bundle.",
    "analyze": "Find a model's attention sinks and recommend how many to keep.",
    "tune": "Find factors on attention to the first token, without training.",
    "serve": "Serve a bundle over the OpenAI HTTP API.",
    "inspect": "Show a bundle, model, calibration, families, recipes or cpu.",
}
EXIT_BAD_INPUT = 2
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
INTERRUPT_AGAIN_S = 0.05
"""Time after which a Ctrl-C that Python had to swallow is repeated."""
OPTIONAL_PACKAGES = {
    **dict.fromkeys(
        (
            "torch",
            "transformers",
            "onnx",
            "onnx_ir",
            "onnxscript",
            "gguf",
            "accelerate",
            "ml_dtypes",
            "pydantic",
            "yaml",
            "regex",
            "sentencepiece",
        ),
        "export",
    ),
    "matplotlib": "plot",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"), "serve"),
}
"""The extra of each package that the runtime does not need."""


class _CtrlCError(Exception):
    """Ctrl-C inside a command."""


class _ReaderGoneError(Exception):
    """Nobody reads stdout any more, as after ``| head``."""


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own, imported on use."""

    def invoke(self, ctx: click.Context) -> object:
        # click's `main` would add an empty line to the first and exit with 1 for the second.
        interrupts = _recorded_interrupts()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _CtrlCError from error
        except BrokenPipeError as error:
            raise _ReaderGoneError from error
        except Exception as error:
            if interrupts:  # libraries turn Ctrl-C into errors of their own: torch's tracer and converter do
                raise _CtrlCError from error
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"sinkexport.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the overview from the table above: help must not import anything heavy."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sinkexport")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Export language models once, decode forever in constant memory.

    \b
      sinkexport export MODEL -o DIR      a model to a bundle
      sinkexport run DIR --chat           talk to it for weeks

    `sinkexport COMMAND --help` shows a command's options.
    """


def main() -> None:
    """Entry point.

    Exit codes: 0 ok, 1 failed check, 2 bad usage or input, 70 a bug of ours, 130 interrupted. Errors are one line
    on stderr, with a traceback before it if ``--debug`` was given.
    """
    debug = "--debug" in sys.argv[1:]
    try:
        _fill_closed_descriptors()
        _let_stderr_fail()
        code = cli.main(prog_name="sinkexport", standalone_mode=False)
        sys.stdout.flush()  # a reader that has gone is noticed here, where it can still be handled
        sys.exit(code)  # None, but for a command that called `ctx.exit(code)`
    except (_CtrlCError, KeyboardInterrupt, click.exceptions.Abort):
        # All is tidied up, and what is left is Python's own end: a second Ctrl-C would make it a death by signal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.stderr.isatty():
            click.echo(err=True)  # the terminal has shown ^C, or the text that was cut short
        _fail("interrupted", EXIT_INTERRUPTED, debug)
    except (_ReaderGoneError, BrokenPipeError):
        # Point stdout elsewhere, or Python would fail on flushing it at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except click.exceptions.ClickException as error:
        _fail(_usage(error), EXIT_BAD_INPUT, debug)
    except SinkError as error:
        _fail(str(error), EXIT_BAD_INPUT, debug)
    except ModuleNotFoundError as error:
        extra = OPTIONAL_PACKAGES.get((error.name or "").partition(".")[0])
        if extra is None:
            _fail(_bug(error), EXIT_INTERNAL, debug)
        _fail(
            f"this command needs the package '{error.name}': pip install 'sinkexport[{extra}]'", EXIT_BAD_INPUT, debug
        )
    except OSError as error:  # a file without read permission, a full disk
        _fail(f"{error.strerror or error}" + (f": '{error.filename}'" if error.filename else ""), EXIT_BAD_INPUT, debug)
    except MemoryError:
        _fail("not enough memory: use a smaller model or window, or fp16", EXIT_BAD_INPUT, debug)
    except Exception as error:
        _fail(_bug(error), EXIT_INTERNAL, debug)


def _fill_closed_descriptors() -> None:
    """Open /dev/null in place of a closed stdin (``<&-``) or stderr; refuse a closed stdout.

    Left closed, the next file that is opened would get the number, and output would land in it.

    Raises: UsageError.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    while (handle := os.open(os.devnull, os.O_RDWR)) in closed:
        os.set_inheritable(handle, True)
    os.close(handle)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False))
    if 1 in closed:
        raise UsageError(
            problem(
                "stdout",
                received="a closed one",
                expected="somewhere to write to",
                fix="redirect it to a file or to /dev/null",
            )
        )


class _Lossy(io.FileIO):
    """A file that accepts all that is written, and loses what cannot be."""

    def write(self, data: Buffer, /) -> int:
        """Write what can be written. Raises nothing."""
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size  # None: it would have to wait
        except OSError:
            return size


def _let_stderr_fail() -> None:
    """Make errors of stderr harmless: a full disk or a reader that has gone must end no stream.

    Nor may it change an exit code.
    """
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        file = io.BufferedWriter(_Lossy(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(
            file, sys.stderr.encoding, sys.stderr.errors, line_buffering=True, write_through=True
        )


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _recorded_interrupts() -> list[int]:
    """Record every Ctrl-C from now on in a list; each still raises KeyboardInterrupt.

    Inside a finalizer it cannot be raised: Python would print its traceback and go on. It is repeated a moment later.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    def quiet(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        # To this thread, so that it wakes up from whatever it waits for.
        again = threading.Timer(INTERRUPT_AGAIN_S, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        again.daemon = True
        again.start()

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = quiet
    return seen


def _usage(error: click.exceptions.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f"; see '{context.command_path} --help'" if context else ""
    return error.format_message().rstrip(".") + hint


def _bug(error: Exception) -> str:
    return (
        f"unexpected {type(error).__name__}: {error}; this is a bug: report it with what 'sinkexport --debug ..' prints"
    )


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    click.echo(f"sinkexport: error: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
