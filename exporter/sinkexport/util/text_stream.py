"""Lines of text streams of any length, in constant memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO, Protocol

READ_BYTES = 4096


class RawReader(Protocol):
    """A stream whose `read` returns as soon as there is anything."""

    def read(self, size: int, /) -> bytes | None: ...


def utf8_lines(source: RawReader) -> Iterator[list[str]]:
    """Yield the lines of a byte stream, those of one read together, line breaks included.

    Bytes that are not UTF-8 become U+FFFD. A line longer than `READ_BYTES` characters comes in parts, cut before a
    space if it has one, never inside a character. So memory stays constant even if no line break ever comes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    while block := source.read(READ_BYTES):
        text += decoder.decode(block)
        *lines, text = text.split("\n")
        parts = [line + "\n" for line in lines]
        while len(text) > READ_BYTES:
            cut = text.rfind(" ", 1, READ_BYTES)
            cut = READ_BYTES if cut < 0 else cut
            parts.append(text[:cut])
            text = text[cut:]
        if parts:
            yield parts
    if text := text + decoder.decode(b"", final=True):
        yield [text]


def complete_lines(source: BinaryIO) -> Iterator[str]:
    """Yield whole lines of a buffered byte stream without line breaks; bytes that are not UTF-8 become U+FFFD."""
    while line := source.readline():
        yield line.decode("utf-8", errors="replace").rstrip("\r\n")
