"""``sinkexport run``: stream text from a bundle."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from sinkrt import Session, UsageError
from sinkrt.answer import AnswerParams
from sinkrt.errors import problem
from sinkrt.sampler import SamplingParams
from sinkrt.state import check_state_target
from sinkrt.text.template_args import parse_template_args

from sinkexport.bench.run_meter import RunMeter
from sinkexport.commands.options import (
    allow_special_option,
    backend_option,
    bundle_argument,
    file_option,
    template_arg_option,
    threads_option,
)
from sinkexport.commands.run_form import AnswerForm
from sinkexport.commands.run_input import UserTexts, feed_stdin, typed_messages
from sinkexport.util.signals import exiting_on_signals


@click.command(name="run")
@bundle_argument
@click.option("--prompt", metavar="TEXT", help="Text to continue. Without it and without --chat, stdin is read.")
@click.option("--chat", is_flag=True, help="A conversation: one message a line of stdin, one answer each.")
@click.option("--system", metavar="TEXT", help="System message that opens the conversation (with --chat).")
@click.option("--pin-system", is_flag=True, help="Refuse a --system message that the sinks do not keep forever.")
@template_arg_option(" (with --chat)")
@allow_special_option("your text")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop an answer after N tokens.  [default: at the end of the text]",
)
@click.option("--temperature", type=float, default=SamplingParams.temperature, show_default=True, help="0 is greedy.")
@click.option(
    "--top-k", type=int, default=SamplingParams.top_k, show_default=True, help="Keep the K likeliest tokens; 0: all."
)
@click.option(
    "--top-p",
    type=float,
    default=SamplingParams.top_p,
    show_default=True,
    help="Keep the likeliest tokens that sum to P.",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=SamplingParams.repetition_penalty,
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
@file_option("--json-schema", help="Make answers match the JSON schema in this file.")
@click.option("--regex", metavar="R", help="Make answers match this regular expression as a whole.")
@file_option("--grammar", help="Make answers match the grammar in this file (llguidance's Lark, or GBNF).")
@click.option("--ignore-eos", is_flag=True, help="Go on when the model ends its text: forever without --max-tokens.")
@backend_option
@threads_option
@file_option("--load-state", help="Go on from a saved stream.")
@file_option("--save-state", help="Save the stream at the end, also when interrupted.")
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    metavar="N",
    help="Save the stream every N tokens too, so that a crash or a power cut loses no more.",
)
@click.option("--resume", is_flag=True, help="Go on with the answer in which --load-state was saved: no new text.")
@click.option("--stats", is_flag=True, help="Show speed and memory on stderr at the end.")
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
    json_schema: Path | None,
    regex: str | None,
    grammar: Path | None,
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
    form = AnswerForm.read(json_schema, regex, grammar, resume=resume)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no emoji must not end the stream
    with Session.load(bundle, backend, threads=threads) as session:
        _check_batch(session)
        form.compile(session)
        texts = UserTexts(session.tokenizer, variables, allow_special)
        if system is not None:  # before anything is read
            session.tokenizer.require_system()
            if pin_system:
                session.require_pinned(system, template_args=variables)
        if load_state is not None:
            session.load_state(load_state)
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
            **form.options,
        )
        answers = _Answers(session, generate, save_state, save_every)
        with answers.saving(stats=stats):
            if resume:
                answers.write(None)
            elif chat:
                _chat(session, texts, system, answers)
            elif prompt is not None:
                answers.write(texts.prompt(prompt, begun=bool(session.position[0])))
            else:
                answers.write(feed_stdin(session, texts))


class _Answers:
    """Writes answers to stdout, and saves the stream.

    generate: as `Session.generate`, from ids. save_state: where to save; None: nowhere. save_every: tokens between
    saves during an answer; None: only at the end.
    """

    def __init__(
        self,
        session: Session,
        generate: Callable[[list[int] | None], Iterator[str]],
        save_state: Path | None,
        save_every: int | None,
    ) -> None:
        self._session, self._generate = session, generate
        self._save_state, self._save_every = save_state, save_every
        self._meter = RunMeter(session)
        self._saved_at = self._tried_at = self._position

    @contextlib.contextmanager
    def saving(self, *, stats: bool) -> Iterator[None]:
        """Save the stream at the end of the block, also if an error or a signal ends it: an endless run ends so.

        stats: report speed and memory on stderr too.
        """
        with exiting_on_signals():
            try:
                yield
            finally:
                self._save()
                if stats:
                    click.echo(self._meter.report(), err=True)

    @property
    def _position(self) -> int:
        return int(self._session.position[0])

    def write(self, ids: list[int] | None) -> None:
        """Write one answer. ids: what it answers; None goes on with the answer of a saved stream."""
        for piece in self._meter.timed(self._generate(ids)):
            sys.stdout.write(piece)
            sys.stdout.flush()
            if self._save_every is not None and self._position - self._tried_at >= self._save_every:
                self._try_to_save()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _save(self) -> None:
        """Save the stream, unless nothing has changed.

        Raises: UsageError if the file cannot be written.
        """
        if self._save_state is not None and self._position != self._saved_at:
            self._session.save_state(self._save_state)
            self._saved_at = self._position

    def _try_to_save(self) -> None:
        """Save; warn if that fails. A full disk may have room later: the stream is worth more than this save."""
        self._tried_at = self._position
        try:
            self._save()
        except UsageError as error:
            click.echo(f"sinkexport: warning: not saved at position {self._tried_at}: {error}", err=True)


def _check_batch(session: Session) -> None:
    if session.batch != 1:
        raise UsageError(
            problem(
                "run",
                received=f"a bundle of {session.batch} streams",
                expected="batch 1",
                fix="export with --batch 1, or use sinkrt.Session",
            )
        )


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
    """Check options that need or exclude each other, before anything is loaded.

    Raises: UsageError.
    """
    no_new_text = "without --load-state" if load_state is None else "with --chat or --prompt"
    for is_wrong, option, received, expected, fix in (
        (
            chat and prompt is not None,
            "--prompt",
            "with --chat",
            "one of the two",
            "type the message, or pipe it into --chat",
        ),
        (system is not None and not chat, "--system", "without --chat", "a conversation", "add --chat"),
        (bool(template_args) and not chat, "--template-arg", "without --chat", "a conversation", "add --chat"),
        (pin_system and system is None, "--pin-system", "without --system", "a system message", "add --system TEXT"),
        (
            resume and (load_state is None or chat or prompt is not None),
            "--resume",
            no_new_text,
            "a saved state and no new text",
            "pass --load-state FILE alone",
        ),
        (
            save_every is not None and save_state is None,
            "--save-every",
            "without --save-state",
            "a file to save to",
            "add --save-state FILE",
        ),
    ):
        if is_wrong:
            raise UsageError(problem(option, received=received, expected=expected, fix=fix))
    if save_state is not None:
        check_state_target(save_state, "--save-state")  # not after hours of streaming


def _chat(session: Session, texts: UserTexts, system: str | None, answers: _Answers) -> None:
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
    for message in typed_messages():
        answers.write(texts.next_turn(message) if session.position[0] else texts.opening(system, message))
