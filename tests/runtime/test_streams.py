"""Reading endless text: every byte once, in order, in bounded pieces, as soon as it is there."""

from __future__ import annotations

import io
import itertools
import mmap
import os
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from sinkexport.bench.run_meter import RunMeter
from sinkexport.util.process_memory import resident_bytes
from sinkexport.util.text_stream import READ_BYTES, RawReader, complete_lines, utf8_lines
from sinkrt import Session


def all_lines(source: RawReader) -> list[str]:
    return [line for lines in utf8_lines(source) for line in lines]


class Blocks:
    """Hands out given blocks, one a read."""

    def __init__(self, blocks: list[bytes]) -> None:
        self._blocks = iter([block for block in blocks if block])

    def read(self, _size: int) -> bytes:
        return next(self._blocks, b"")


@settings(max_examples=200)
@given(st.text(max_size=60), st.lists(st.integers(0, 200), max_size=8))
def test_nothing_is_lost_wherever_it_is_cut(text: str, cuts: list[int]) -> None:
    data = text.encode()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    blocks = [data[a:b] for a, b in itertools.pairwise(edges)]
    lines = all_lines(Blocks(blocks))
    assert "".join(lines) == text
    assert all("\n" not in line[:-1] for line in lines)


@settings(max_examples=100)
@given(st.binary(max_size=50))
def test_bytes_that_are_no_text_become_replacements(data: bytes) -> None:
    assert "".join(all_lines(io.BytesIO(data))) == data.decode(errors="replace")


def test_a_line_without_end_comes_in_bounded_parts() -> None:
    text = "wörd " * 5000 + "x" * 20_000 + "🙂" * 3000
    parts = all_lines(io.BytesIO(text.encode()))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= READ_BYTES
    assert all(part.startswith(" ") for part in parts[1:5]), "words stay whole where there are spaces"


def test_lines_come_as_soon_as_they_are_there() -> None:
    reader, writer = os.pipe()
    arrived: list[tuple[str, float]] = []

    def consume() -> None:
        with os.fdopen(reader, "rb", buffering=0) as source:
            arrived.extend((line, time.monotonic()) for lines in utf8_lines(source) for line in lines)

    thread = threading.Thread(target=consume)
    thread.start()
    os.write(writer, b"one\ntw")
    time.sleep(0.3)
    assert [line for line, _ in arrived] == ["one\n"]
    os.write(writer, b"o\n")
    os.close(writer)
    thread.join(timeout=10)
    assert [line for line, _ in arrived] == ["one\n", "two\n"]


def test_messages_are_whole_lines() -> None:
    data = "one\r\n\ntw\xffo\nlast".encode("latin-1")
    assert list(complete_lines(io.BytesIO(data))) == ["one", "", "tw\N{REPLACEMENT CHARACTER}o", "last"]


def test_the_meter_counts_tokens_and_windows(session: Session) -> None:
    meter = RunMeter(session)
    assert meter.report().startswith("no tokens; position 0, 0.0 windows of 6;")
    list(meter.timed(session.generate("ab", max_tokens=18, ignore_eos=True)))
    report = meter.report()
    assert report.startswith("18 tokens, "), report
    assert "position 20, 3.0 windows of 6; memory " in report
    assert "ms/token median" in report and "ms p99" in report


def test_the_meter_keeps_the_last_latencies_only(session: Session) -> None:
    meter = RunMeter(session, kept=8)
    list(meter.timed(session.generate("ab", max_tokens=300, ignore_eos=True)))
    assert "ms/token" in meter.report()
    assert meter.latencies_ms.size == 8
    assert meter.latencies_ms.all()


def test_resident_memory_grows_with_use() -> None:
    before = resident_bytes()
    with mmap.mmap(-1, 32 * 2**20) as block:  # new pages: NumPy may reuse what other tests have freed
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert resident_bytes() - before > 24 * 2**20
