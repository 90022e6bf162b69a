"""``sinkexport run``: stream text from a bundle."""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from sinkrt import Session, UsageError
from sinkrt.errors import problem

MIB = 2**20
READ_BYTES = 4096


@click.command(name="run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to continue. Without it and without --chat, stdin is read.")
@click.option("--chat", is_flag=True, help="A conversation: one message a line of stdin, one answer each.")
@click.option("--system", metavar="TEXT", help="System message that opens the conversation (with --chat).")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N",
              help="Stop an answer after N tokens.  [default: at the end of the text]")  # fmt: skip
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens that sum to P.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True,
              help="Above 1: make tokens that the cache still spans less likely.")  # fmt: skip
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on when the model ends its text: for ever without --max-tokens.")
@click.option("--backend", type=click.Choice(["ort", "ort-cuda", "tensorrt"]), default="ort", show_default=True)
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: all physical cores]")
@click.option("--load-state", type=click.Path(path_type=Path), metavar="FILE", help="Go on from a saved stream.")
@click.option("--save-state", type=click.Path(path_type=Path), metavar="FILE", help="Save the stream at the end.")
@click.option("--stats", is_flag=True, help="Tell speed and memory on stderr at the end.")
def command(
    bundle: Path, prompt: str | None, chat: bool, system: str | None, max_tokens: int | None, temperature: float,
    top_k: int, top_p: float, repetition_penalty: float, seed: int | None, ignore_eos: bool, backend: str,
    threads: int | None, load_state: Path | None, save_state: Path | None, stats: bool,
) -> None:  # fmt: skip
    """Stream text from BUNDLE to stdout as it is produced."""
    if chat and prompt is not None:
        raise UsageError(problem("--prompt", received="with --chat", expected="one of the two",
                                 fix="type the message, or pipe it into --chat"))  # fmt: skip
    if system is not None and not chat:
        raise UsageError(problem("--system", received="without --chat", expected="a conversation", fix="add --chat"))
    with Session.load(bundle, backend, threads=threads) as session:
        if load_state is not None:
            session.load_state(load_state)
        meter = Meter(session)

        def answer(ids: list[int]) -> None:
            pieces = session.generate(
                ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                repetition_penalty=repetition_penalty, seed=seed, ignore_eos=ignore_eos,
            )  # fmt: skip
            for piece in meter.timed(pieces):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()

        try:
            if chat:
                _chat(session, system, answer)
            elif prompt is not None:
                answer(session.tokenizer.encode(prompt))
            else:
                answer(_feed_stdin(session))
        finally:  # an endless run ends by Ctrl-C: its stream is worth keeping then too
            if save_state is not None:
                session.save_state(save_state)
            if stats:
                click.echo(meter.report(), err=True)


def _chat(session: Session, system: str | None, answer: object) -> None:
    """Feed each message in the model's chat format. What was said before is in the ring and never fed again."""
    tokenizer = session.tokenizer
    opened = bool(session.position[0])
    interactive = sys.stdin.isatty()
    for message in _lines(interactive):
        if not message.strip():
            continue
        turns = [{"role": "user", "content": message}]
        if not opened:
            if system is not None:
                turns.insert(0, {"role": "system", "content": system})
            text = tokenizer.render_chat(turns)
        else:
            text = _later_turn(session, turns)
        opened = True
        answer(tokenizer.encode(text, special=False))  # type: ignore[operator]


def _later_turn(session: Session, turns: list[dict[str, str]]) -> str:
    """A later message alone: what the template adds for it after an answer, without repeating the opening.

    Templates only render whole conversations, so the text of one more exchange is taken from the end of two.
    """
    tokenizer = session.tokenizer
    marker = "\x00"
    past = [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
    whole = tokenizer.render_chat([*past, *turns])
    return whole[whole.rindex(marker) + 1 :]


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        if interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


def _feed_stdin(session: Session) -> list[int]:
    """Feed stdin line by line as it arrives, however long it is; hand back the ids of its last line, not fed yet."""
    tokenizer = session.tokenizer
    waiting: list[int] = []
    first = True
    for line in _decoded_lines():
        if waiting:
            session.prefill(waiting)
        waiting = tokenizer.encode(line, special=first)
        first = False
    if not waiting:
        raise UsageError(problem("stdin", received="no text", expected="text to continue",
                                 fix="pass --prompt TEXT, or pipe some text in"))  # fmt: skip
    return waiting


def _decoded_lines() -> Iterator[str]:
    """Lines of stdin, cut at READ_BYTES where there is no line break, never inside a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    while block := os.read(sys.stdin.fileno(), READ_BYTES):  # returns as soon as there is anything
        text += decoder.decode(block)
        *lines, text = text.splitlines(keepends=True) or [""]
        yield from lines
        if len(text) > READ_BYTES:
            yield text
            text = ""
    if text := text + decoder.decode(b"", final=True):
        yield text


class Meter:
    """Speed and memory of a run, in constant memory itself: it keeps the last `KEPT` latencies."""

    KEPT = 100_000

    def __init__(self, session: Session) -> None:
        self._session = session
        self._latencies_s = np.zeros(self.KEPT)
        self._count = 0
        self._rss_at_start = _resident_bytes()

    def timed(self, pieces: Iterator[str]) -> Iterator[str]:
        """Pass pieces on; the time from one to the next, shared among the tokens in between, is a latency."""
        before, position = time.perf_counter(), int(self._session.position[0])
        for piece in pieces:
            now, reached = time.perf_counter(), int(self._session.position[0])
            for _ in range(reached - position):
                self._latencies_s[self._count % self.KEPT] = (now - before) / (reached - position)
                self._count += 1
            yield piece
            before, position = time.perf_counter(), reached

    def report(self) -> str:
        """One line."""
        stream = self._session.manifest.stream
        position = int(self._session.position[0])
        wraps = max(0, position - stream.num_sink_tokens) / stream.window_size
        kept = self._latencies_s[: min(self._count, self.KEPT)] * 1e3
        speed = (
            f"{self._count} tokens, {np.median(kept):.1f} ms/token median, {np.percentile(kept, 99):.1f} ms p99"
            if self._count
            else "no tokens"
        )
        rss = _resident_bytes()
        return (
            f"{speed}; position {position}, {wraps:.1f} windows of {stream.window_size}; "
            f"memory {rss / MIB:.0f} MiB ({(rss - self._rss_at_start) / MIB:+.1f} MiB since the start), "
            f"state {self._session.manifest.state_bytes / MIB:.1f} MiB"
        )


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * 4096
