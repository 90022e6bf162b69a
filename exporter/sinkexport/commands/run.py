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
from typing import Any

import click
from sinkrt import Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.chat_template import parse_template_args
from sinkrt.errors import problem
from sinkrt.sampler import SamplingParams
from sinkrt.state import check_state_target
from sinkrt.text import Tokenizer

from sinkexport.bench.run_meter import RunMeter, complete_lines, utf8_lines

ENDING_SIGNALS = [signal.SIGTERM, signal.SIGHUP] if hasattr(signal, "SIGHUP") else [signal.SIGTERM]


@click.command(name="run")
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue. Without it and without --chat, stdin is read.")
@click.option("--chat", is_flag=True, help="A conversation: one message a line of stdin, one answer each.")
@click.option("--system", metavar="TEXT", help="System message that opens the conversation (with --chat).")
@click.option("--pin-system", is_flag=True, help="Refuse a --system message that the sinks do not keep for ever.")
@click.option(
    "--template-arg",
    "template_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a variable of the chat template, e.g. enable_thinking=false (with --chat). VALUE is read as "
    "JSON where it is JSON, else as text; may be repeated.  [default: the template's own]",
)
@click.option(
    "--allow-special",
    is_flag=True,
    help="Let names of special tokens in your text, such as <|im_end|>, become those tokens.  [default: they "
    "stay ordinary text]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop an answer after N tokens.  [default: at the end of the text]",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens that sum to P.")
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1: make tokens that the cache still spans less likely.",
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="End an answer before this text, which may name special tokens (<|im_end|>); may be repeated.",
)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on when the model ends its text: for ever without --max-tokens.")
@click.option(
    "--backend",
    type=click.Choice(["ort", "ort-cuda", "tensorrt"]),
    default="ort",
    show_default=True,
    help="What computes.",
)
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: all physical cores]")
@click.option("--load-state", type=click.Path(path_type=Path), metavar="FILE", help="Go on from a saved stream.")
@click.option(
    "--save-state",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Save the stream at the end, also when interrupted.",
)
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    metavar="N",
    help="Save the stream every N tokens too, so that a crash or a power cut loses no more.",
)
@click.option("--resume", is_flag=True, help="Go on with the answer in which --load-state was saved: no new text.")
@click.option("--stats", is_flag=True, help="Tell speed and memory on stderr at the end.")
def command(
    bundle: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    pin_system: bool,
    template_args: tuple[str, ...],
    allow_special: bool,
    max_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
    ignore_eos: bool,
    backend: str,
    threads: int | None,
    load_state: Path | None,
    save_state: Path | None,
    save_every: int | None,
    resume: bool,
    stats: bool,
) -> None:
    """Stream text from the bundle DIR to stdout as it is produced.

    Continues --prompt TEXT, or talks with --chat, or reads text of any length from stdin and continues that. The
    stream never ends by itself but at the model's end of text; Ctrl-C stops it.
    """
    _check_together(prompt, chat, system, pin_system, template_args, load_state, save_state, save_every, resume)
    variables = parse_template_args(template_args)
    # Refused before any text is read, fed or saved.
    SamplingParams(temperature, top_k, top_p, repetition_penalty, seed)
    AnswerParams(max_tokens, stop, ignore_eos)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no emoji must not end the stream
    with Session.load(bundle, backend, threads=threads) as session:
        if session.batch != 1:
            raise UsageError(
                problem(
                    "run",
                    received=f"a bundle of {session.batch} streams",
                    expected="batch 1",
                    fix="export with --batch 1, or use sinkrt.Session",
                )
            )
        texts = UserTexts(session.tokenizer, variables, allow_special)
        if system is not None:  # before anything is read
            session.tokenizer.require_system()
            if pin_system:
                session.require_pinned(system, template_args=variables)
        if load_state is not None:
            session.load_state(load_state)
        start = int(session.position[0])
        generate = functools.partial(
            session.generate,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        meter = RunMeter(session)
        saved_at = tried_at = start

        def save() -> None:
            nonlocal saved_at
            if save_state is not None and int(session.position[0]) != saved_at:
                session.save_state(save_state)
                saved_at = int(session.position[0])

        def save_on_the_way() -> None:
            """A full disk may have room again later: the stream is worth more than this save."""
            nonlocal tried_at
            tried_at = int(session.position[0])
            try:
                save()
            except UsageError as error:
                click.echo(f"sinkexport: warning: not saved at position {tried_at}: {error}", err=True)

        def answer(ids: list[int] | None) -> None:
            for piece in meter.timed(generate(ids)):
                sys.stdout.write(piece)
                sys.stdout.flush()
                if save_every is not None and int(session.position[0]) - tried_at >= save_every:
                    save_on_the_way()
            sys.stdout.write("\n")
            sys.stdout.flush()

        with _unwinding_termination():
            try:
                if resume:
                    answer(None)
                elif chat:
                    _chat(session, texts, system, answer)
                elif prompt is not None:
                    answer(texts.prompt(prompt, begun=bool(start)))
                else:
                    answer(_feed_stdin(session, texts))
            finally:  # an endless run ends by a signal: its stream is worth keeping then too
                save()
                if stats:
                    click.echo(meter.report(), err=True)


def _check_together(
    prompt: str | None,
    chat: bool,
    system: str | None,
    pin_system: bool,
    template_args: tuple[str, ...],
    load_state: Path | None,
    save_state: Path | None,
    save_every: int | None,
    resume: bool,
) -> None:
    """Options that need or exclude each other, told before anything is loaded.

    Raises: UsageError.
    """
    if chat and prompt is not None:
        raise UsageError(
            problem(
                "--prompt",
                received="with --chat",
                expected="one of the two",
                fix="type the message, or pipe it into --chat",
            )
        )
    if system is not None and not chat:
        raise UsageError(problem("--system", received="without --chat", expected="a conversation", fix="add --chat"))
    if template_args and not chat:
        raise UsageError(
            problem("--template-arg", received="without --chat", expected="a conversation", fix="add --chat")
        )
    if pin_system and system is None:
        raise UsageError(
            problem("--pin-system", received="without --system", expected="a system message", fix="add --system TEXT")
        )
    if resume and (load_state is None or chat or prompt is not None):
        what = "without --load-state" if load_state is None else "with --chat or --prompt"
        raise UsageError(
            problem(
                "--resume", received=what, expected="a saved state and no new text", fix="pass --load-state FILE alone"
            )
        )
    if save_every is not None and save_state is None:
        raise UsageError(
            problem(
                "--save-every",
                received="without --save-state",
                expected="a file to save to",
                fix="add --save-state FILE",
            )
        )
    if save_state is not None:
        check_state_target(save_state, "--save-state")  # not after hours of streaming


class UserTexts:
    """Turns what the user writes into ids, and says once if a special token's name in it stays text.

    variables: of the chat template. allow_special: such names become the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, variables: dict[str, Any], allow_special: bool) -> None:
        self._tokenizer = tokenizer
        self._variables = variables
        self._allow_special = allow_special
        self._warned = allow_special

    def prompt(self, text: str, *, begun: bool) -> list[int]:
        """Ids of a text to continue."""
        self._warn(text)
        return self._tokenizer.prompt_ids(text, begun=begun, allow_special=self._allow_special)

    def opening(self, system: str | None, message: str) -> list[int]:
        """Ids of a conversation's first turn."""
        self._warn(message, system or "")
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": message})
        return self._tokenizer.chat_ids(turns, template_args=self._variables, allow_special=self._allow_special)

    def next_turn(self, message: str) -> list[int]:
        """Ids of a later turn."""
        self._warn(message)
        return self._tokenizer.next_turn_ids(message, template_args=self._variables, allow_special=self._allow_special)

    def check_template(self, system: str | None) -> None:
        """Raises: UsageError for a chat template that is missing or fails, or variables that it does not take."""
        turns = [] if system is None else [{"role": "system", "content": system}]
        self._tokenizer.render_chat([*turns, {"role": "user", "content": "?"}], template_args=self._variables)

    def _warn(self, *texts: str) -> None:
        name = None if self._warned else next(filter(None, map(self._tokenizer.special_in, texts)), None)
        if name is not None:
            self._warned = True
            click.echo(
                f"Note: '{name}' in the text is taken as ordinary text; --allow-special makes it a token.", err=True
            )


def _chat(session: Session, texts: UserTexts, system: str | None, answer: Callable[[list[int]], None]) -> None:
    """Feed each message in the model's chat format. What was said before is in the ring and never fed again."""
    texts.check_template(system)  # before anybody has typed a message
    if system is not None and session.position[0]:
        raise UsageError(
            problem(
                "--system",
                received="with the state of a conversation that has begun",
                expected="one or the other",
                fix="leave out --system or --load-state",
            )
        )
    for message in _messages():
        answer(texts.next_turn(message) if session.position[0] else texts.opening(system, message))


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


def _feed_stdin(session: Session, texts: UserTexts) -> list[int]:
    """Feed stdin as it arrives, however long it is; hand back its last id, not fed yet."""
    if sys.stdin.isatty():
        click.echo("Reading text to continue; Ctrl-D ends it.", err=True)
    waiting: list[int] = []
    begun = bool(session.position[0])
    for lines in utf8_lines(io.FileIO(sys.stdin.fileno(), closefd=False)):  # unbuffered: as it arrives
        for text in lines:
            waiting += texts.prompt(text, begun=begun)
            begun = True
        if len(waiting) > 1:
            session.prefill(waiting[:-1])
            waiting = waiting[-1:]
    if not waiting:
        raise UsageError(
            problem(
                "stdin", received="no text", expected="text to continue", fix="pass --prompt TEXT, or pipe some text in"
            )
        )
    return waiting


@contextlib.contextmanager
def _unwinding_termination() -> Iterator[None]:
    """Make SIGTERM, which service managers send, and SIGHUP, of a terminal or a connection that has gone, end the
    program in an orderly way: the state is saved. One that is ignored (nohup) stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main one
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in before:  # a terminal that goes sends several: none may cut the saving short
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: handler for number in ENDING_SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
