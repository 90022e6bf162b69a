"""What the user of ``sinkexport run`` writes: prompts, messages, and text of any length from stdin."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import click
from sinkrt import Session, UsageError
from sinkrt.errors import problem
from sinkrt.text import Tokenizer

from sinkexport.util.text_stream import complete_lines, utf8_lines


class UserTexts:
    """Turns what the user writes into ids; notes once that a special token's name in it stays text.

    variables: of the chat template. allow_special: such names become the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, variables: dict[str, Any], allow_special: bool) -> None:
        self._tokenizer = tokenizer
        self._variables = variables
        self._allow_special = allow_special
        self._warned = allow_special

    def prompt(self, text: str, *, begun: bool) -> list[int]:
        """Encode a text to continue."""
        self._warn(text)
        return self._tokenizer.prompt_ids(text, begun=begun, allow_special=self._allow_special)

    def opening(self, system: str | None, message: str) -> list[int]:
        """Encode a conversation's first turn."""
        self._warn(message, system or "")
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": message})
        return self._tokenizer.chat_ids(turns, template_args=self._variables, allow_special=self._allow_special)

    def next_turn(self, message: str) -> list[int]:
        """Encode a later turn."""
        self._warn(message)
        return self._tokenizer.next_turn_ids(message, template_args=self._variables, allow_special=self._allow_special)

    def check_template(self, system: str | None) -> None:
        """Render a conversation for trial.

        Raises: UsageError for a chat template that is missing or fails, or variables that it does not take.
        """
        turns = [] if system is None else [{"role": "system", "content": system}]
        self._tokenizer.render_chat([*turns, {"role": "user", "content": "?"}], template_args=self._variables)

    def _warn(self, *texts: str) -> None:
        name = None if self._warned else next(filter(None, map(self._tokenizer.special_in, texts)), None)
        if name is not None:
            self._warned = True
            click.echo(
                f"Note: '{name}' in the text is taken as ordinary text; --allow-special makes it a token.", err=True
            )


def typed_messages() -> Iterator[str]:
    """Yield the lines of stdin that are not blank, with a prompt on stderr if somebody types them."""
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


def feed_stdin(session: Session, texts: UserTexts) -> list[int]:
    """Feed stdin as it arrives, however long it is. Returns: its last id, which is not fed yet."""
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
