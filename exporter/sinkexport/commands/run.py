"""``sinkexport run``: stream text from a bundle."""

from __future__ import annotations

import contextlib
import functools
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import click
from sinkrt import Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.errors import problem
from sinkrt.sampler import SamplingParams
from sinkrt.text import Tokenizer

from sinkexport.streams import RunMeter, complete_lines, utf8_lines

EXIT_TERMINATED = 128 + signal.SIGTERM


@click.command(name="run")
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue. Without it and without --chat, stdin is read.")
@click.option("--chat", is_flag=True, help="A conversation: one message a line of stdin, one answer each.")
@click.option("--system", metavar="TEXT", help="System message that opens the conversation (with --chat).")
@click.option("--pin-system", is_flag=True, help="Refuse a --system message that the sinks do not keep for ever.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N",
              help="Stop an answer after N tokens.  [default: at the end of the text]")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens that sum to P.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True,
              help="Above 1: make tokens that the cache still spans less likely.")  # fmt: skip
@click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text; may be repeated.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on when the model ends its text: for ever without --max-tokens.")
@click.option("--backend", type=click.Choice(["ort", "ort-cuda", "tensorrt"]), default="ort", show_default=True,
              help="What computes.")  # fmt: skip
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: all physical cores]")
@click.option("--load-state", type=click.Path(path_type=Path), metavar="FILE", help="Go on from a saved stream.")
@click.option("--save-state", type=click.Path(path_type=Path), metavar="FILE",
              help="Save the stream at the end, also when interrupted.")  # fmt: skip
@click.option("--save-every", type=click.IntRange(min=1), metavar="N",
              help="Save the stream every N tokens too, so that a crash or a power cut loses no more.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the answer in which --load-state was saved: no new text.")
@click.option("--stats", is_flag=True, help="Tell speed and memory on stderr at the end.")
def command(
    bundle: Path, prompt: str | None, chat: bool, system: str | None, pin_system: bool, max_tokens: int | None,
    temperature: float, top_k: int, top_p: float, repetition_penalty: float, stop: tuple[str, ...], seed: int | None,
    ignore_eos: bool, backend: str, threads: int | None, load_state: Path | None, save_state: Path | None,
    save_every: int | None, resume: bool, stats: bool,
) -> None:  # fmt: skip
    """Stream text from the bundle DIR to stdout as it is produced.

    Continues --prompt TEXT, or talks with --chat, or reads text of any length from stdin and continues that. The
    stream never ends by itself but at the model's end of text; Ctrl-C stops it.
    """
    _check_together(prompt, chat, system, pin_system, load_state, save_state, save_every, resume)
    # Refused before any text is read, fed or saved.
    SamplingParams(temperature, top_k, top_p, repetition_penalty, seed)
    AnswerParams(max_tokens, stop, ignore_eos)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no emoji must not end the stream
    with Session.load(bundle, backend, threads=threads) as session:
        if session.batch != 1:
            raise UsageError(problem("run", received=f"a bundle of {session.batch} streams", expected="batch 1",
                                     fix="export with --batch 1, or use sinkrt.Session"))  # fmt: skip
        tokenizer = session.tokenizer
        if load_state is not None:
            session.load_state(load_state)
        start = int(session.position[0])
        generate = functools.partial(
            session.generate, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed, stop=stop, ignore_eos=ignore_eos,
        )  # fmt: skip
        meter = RunMeter(session)
        saved_at = start

        def save() -> None:
            nonlocal saved_at
            if save_state is not None and int(session.position[0]) != saved_at:
                session.save_state(save_state)
                saved_at = int(session.position[0])

        def answer(ids: list[int] | None) -> None:
            for piece in meter.timed(generate(ids)):
                sys.stdout.write(piece)
                sys.stdout.flush()
                if save_every is not None and int(session.position[0]) - saved_at >= save_every:
                    save()
            sys.stdout.write("\n")
            sys.stdout.flush()

        with _unwinding_termination():
            try:
                if resume:
                    answer(None)
                elif chat:
                    if pin_system and system is not None:
                        session.require_pinned(system)
                    _chat(session, system, answer)
                elif prompt is not None:
                    answer(tokenizer.encode_next(prompt) if start else tokenizer.encode(prompt))
                else:
                    answer(_feed_stdin(session, tokenizer))
            finally:  # an endless run ends by a signal: its stream is worth keeping then too
                save()
                if stats:
                    click.echo(meter.report(), err=True)


def _check_together(
    prompt: str | None, chat: bool, system: str | None, pin_system: bool, load_state: Path | None,
    save_state: Path | None, save_every: int | None, resume: bool,
) -> None:  # fmt: skip
    """Options that need or exclude each other, told before anything is loaded.

    Raises: UsageError.
    """
    if chat and prompt is not None:
        raise UsageError(problem("--prompt", received="with --chat", expected="one of the two",
                                 fix="type the message, or pipe it into --chat"))  # fmt: skip
    if system is not None and not chat:
        raise UsageError(problem("--system", received="without --chat", expected="a conversation", fix="add --chat"))
    if pin_system and system is None:
        raise UsageError(problem("--pin-system", received="without --system", expected="a system message",
                                 fix="add --system TEXT"))  # fmt: skip
    if resume and (load_state is None or chat or prompt is not None):
        what = "without --load-state" if load_state is None else "with --chat or --prompt"
        raise UsageError(problem("--resume", received=what, expected="a saved state and no new text",
                                 fix="pass --load-state FILE alone"))  # fmt: skip
    if save_every is not None and save_state is None:
        raise UsageError(problem("--save-every", received="without --save-state", expected="a file to save to",
                                 fix="add --save-state FILE"))  # fmt: skip
    if save_state is not None and not save_state.absolute().parent.is_dir():  # not after hours of streaming
        raise UsageError(problem("--save-state", received=f"'{save_state}'", expected="a file in a folder that exists",
                                 fix="make the folder, or choose another path"))  # fmt: skip


def _chat(session: Session, system: str | None, answer: Callable[[list[int]], None]) -> None:
    """Feed each message in the model's chat format. What was said before is in the ring and never fed again."""
    tokenizer = session.tokenizer
    if not tokenizer.has_chat_template:
        tokenizer.render_chat([])  # raises, before anybody has typed a message
    if system is not None and session.position[0]:
        raise UsageError(problem("--system", received="with the state of a conversation that has begun",
                                 expected="one or the other", fix="leave out --system or --load-state"))  # fmt: skip
    for message in _messages():
        if session.position[0]:
            answer(tokenizer.encode_next(tokenizer.render_next_turn(message)))
        else:
            turns = [] if system is None else [{"role": "system", "content": system}]
            turns.append({"role": "user", "content": message})
            answer(tokenizer.encode(tokenizer.render_chat(turns), special=False))


def _messages() -> Iterator[str]:
    """The lines of stdin that are not blank, with a prompt on stderr if somebody types them."""
    interactive = sys.stdin.isatty()
    lines = complete_lines(sys.stdin.buffer)
    while True:
        if interactive:
            click.echo("> ", nl=False, err=True)
        line = next(lines, None)
        if line is None:
            if interactive:
                click.echo(err=True)
            return
        if line.strip():
            yield line


def _feed_stdin(session: Session, tokenizer: Tokenizer) -> list[int]:
    """Feed stdin as it arrives, however long it is; hand back its last id, not fed yet."""
    if sys.stdin.isatty():
        click.echo("Reading text to continue; Ctrl-D ends it.", err=True)
    waiting: list[int] = []
    begun = bool(session.position[0])
    for lines in utf8_lines(io.FileIO(sys.stdin.fileno(), closefd=False)):  # unbuffered: as it arrives
        for text in lines:
            waiting += tokenizer.encode_next(text) if begun else tokenizer.encode(text)
            begun = True
        if len(waiting) > 1:
            session.prefill(waiting[:-1])
            waiting = waiting[-1:]
    if not waiting:
        raise UsageError(problem("stdin", received="no text", expected="text to continue",
                                 fix="pass --prompt TEXT, or pipe some text in"))  # fmt: skip
    return waiting


@contextlib.contextmanager
def _unwinding_termination() -> Iterator[None]:
    """Make SIGTERM, which service managers send, end the program in an orderly way: the state is saved."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main one
        yield
        return

    def leave(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
