"""A server that clients treat badly: silent sockets, dripped headers, answers that nobody reads, no HTTP at all.

Each server is a process of its own, asked over plain sockets.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sinkexport.serve.log import LINES_A_MINUTE, PERIOD_S, FloodFilter
from sinkexport.serve.settings import Limits
from sinkrt import UsageError

from tests.fidelity.serve_process import Process, read_all, serving_process
from tests.runtime.toy import Toy, build_toy

KEY = "sk-edge"
PATH = b"/v1/completions"
POST = b"POST " + PATH + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ENDLESS = {"prompt": "go", "max_tokens": 10**7, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("edges") / "b", Toy(batch=2, chunk_size=4))


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Process]:
    """Short times, no key."""
    with serving_process(
        bundle,
        header_s=1,
        body_s=1,
        keep_alive_s=1,
        stall_s=1,
        grace_s=1,
        max_tokens=10**7,
        max_waiting=2,
        max_body_bytes=2**20,
        send_buffer=4096,
    ) as process:
        yield process


def post(body: object) -> bytes:
    data = json.dumps(body).encode()
    return POST + b"Content-Length: %d\r\n\r\n" % len(data) + data


def closing(request: bytes) -> bytes:
    return request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


@pytest.mark.parametrize("files", [120, 4096])
def test_silent_sockets_keep_nobody_out(bundle: Path, files: int) -> None:
    """More sockets than there may be connections, before any key: with few file descriptors and with many."""
    with serving_process(bundle, key=KEY, max_connections=48, files=files) as process:
        silent = [process.connect() for _ in range(160)]
        assert process.wait_healthy().status_code == 200
        answer = httpx.get(f"{process.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=10)
        assert answer.status_code == 200
        assert process.log.count("\n") < 40
        for raw in silent:
            raw.close()


def test_a_full_server_says_so(bundle: Path) -> None:
    """Connections at work are not closed for new ones."""
    with serving_process(bundle, max_connections=3, max_waiting=1, max_tokens=10**7, stall_s=60) as process:
        streams = [process.connect() for _ in range(3)]
        for raw in streams:
            raw.sendall(post(ENDLESS))
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        status, got = process.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status == 503
        assert b"retry-after" in got.lower()
        assert b'"too many connections' in got
        streams[0].close()
        end = time.monotonic() + 10
        while process.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] != 200:
            assert time.monotonic() < end
        for raw in streams[1:]:
            assert raw.recv(1000), "still served"
            raw.close()


def test_a_silent_socket_is_closed(plain: Process) -> None:
    with plain.connect() as raw:
        assert read_all(raw) == b""


def test_a_header_that_drips_is_refused(plain: Process) -> None:
    """Each byte comes in time, the header does not. Also on a connection that has had an answer."""
    first = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for opening in (b"", first):
        with plain.connect() as raw:
            raw.sendall(opening)
            if opening:
                assert raw.recv(1000).startswith(b"HTTP/1.1 200")
            with pytest.raises(OSError, match=r"Broken pipe|reset"):
                for byte in b"GET /health HTTP/1.1\r\nX: " + b"y" * 200:
                    raw.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert raw.recv(1000).startswith(b"HTTP/1.1 408") or opening


def test_blank_lines_do_not_keep_a_connection(plain: Process) -> None:
    with plain.connect() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            for _ in range(200):
                raw.sendall(b"\r\n")
                time.sleep(0.05)


def test_a_body_that_does_not_come_is_refused(plain: Process) -> None:
    for opening in (POST + b"Content-Length: 100\r\n\r\n{", POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n"):
        status, got = plain.ask(opening)
        assert status == 408
        assert b"body did not arrive" in got


def test_a_refused_upload_does_not_go_on_for_ever(plain: Process) -> None:
    """The answer is out before the body is in: the rest is not read for long."""
    with plain.connect() as raw:
        raw.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 404")
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            for _ in range(200):
                raw.sendall(b"x")
                time.sleep(0.05)


def test_answers_that_nobody_reads_hold_nothing(plain: Process) -> None:
    """There are as many such clients as slots; then a real one is served."""
    lazy = [plain.connect(buffer=4096) for _ in range(4)]
    for raw in lazy:
        raw.sendall(post(ENDLESS))
    body = {"prompt": "x", "max_tokens": 1}
    end = time.monotonic() + 5
    while httpx.post(f"{plain.url}/v1/completions", json=body).status_code != 429:
        assert time.monotonic() < end, "the slots are taken"
    end = time.monotonic() + 20
    while httpx.post(f"{plain.url}/v1/completions", json=body).status_code != 200:
        assert time.monotonic() < end, "the slots never came back"
        time.sleep(0.1)
    for raw in lazy:
        raw.close()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200 + b"\r\n\r\n", 400),  # TLS
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 17_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"y" * 3000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", 400),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (POST + b"Content-Length: 99999999999\r\n\r\n", 413),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n{}", 400),
        (POST + b"Content-Length: 0\r\n\r\n", 400),
        (b"GET /health HTTP/1.0\r\n\r\n", 403),
    ],
    ids=range(16),
)
def test_what_is_no_request_gets_one_line(plain: Process, request_bytes: bytes, status: int) -> None:
    got_status, got = plain.ask(closing(request_bytes) if status in (403, 413, 414) else request_bytes)
    assert got_status == status, got
    error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"].isprintable()


def test_chunks_and_pipelines_are_taken(plain: Process) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"1\r\n%c\r\n" % c for c in body) + b"0\r\n\r\n"
    status, got = plain.ask(chunked * 2 + closing(chunked))
    assert status == 200
    assert got.count(b"HTTP/1.1 200") == 3
    broken = chunked.replace(b"0\r\n\r\n", b"") + b"zz\r\n\r\n"
    assert plain.ask(broken)[0] == 400


def test_floods_leave_few_lines_in_the_log(plain: Process) -> None:
    before = len(plain.log)
    for _ in range(150):
        plain.ask(b"nonsense\r\n\r\n")
    assert plain.log[before:].count("\n") <= 10
    assert "Traceback" not in plain.log


def test_a_flood_filter_counts_what_it_leaves_out() -> None:
    now = [0.0]
    flood = FloodFilter(lambda: now[0])

    def line(message: str, *arguments: object, name: str = "sinkexport.serve") -> logging.LogRecord | None:
        record = logging.LogRecord(name, logging.WARNING, "", 0, message, arguments, None)
        return record if flood.filter(record) else None

    assert sum(line("%d went wrong", i) is not None for i in range(1000)) == LINES_A_MINUTE
    assert line("another") is not None
    assert line("socket.send() raised exception.", name="asyncio") is None  # a client has gone
    assert line("something else", name="asyncio") is not None
    assert line('"%s" %d', "GET /", 200, name="uvicorn.access") is not None
    refused = [line('"%s" %d', "GET /", 401, name="uvicorn.access") for _ in range(100)]
    assert sum(record is not None for record in refused) == LINES_A_MINUTE
    assert all(line('"%s" %d', "GET /", 200, name="uvicorn.access") for _ in range(100))
    now[0] += PERIOD_S
    later = line("%d went wrong", 5)
    assert later is not None
    assert later.getMessage() == f"5 went wrong (and {1000 - LINES_A_MINUTE} more like it before)"
    assert sum(line(f"kind {i}") is not None for i in range(10_000)) < 100


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_client_keeps_the_server_from_ending(bundle: Path, number: signal.Signals) -> None:
    with serving_process(bundle, grace_s=1, max_tokens=10**7, send_buffer=4096) as process:
        clients = [process.connect(buffer=4096) for _ in range(6)]
        clients[1].sendall(b"GET /hea")
        clients[2].sendall(POST + b"Content-Length: 100\r\n\r\n{")
        clients[3].sendall(post(ENDLESS))  # and does not read
        clients[4].sendall(post({**ENDLESS, "stream": False}))
        clients[5].sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        with process.connect() as reader:
            reader.sendall(post(ENDLESS))
            assert reader.recv(100).startswith(b"HTTP/1.1 200")
            process.process.send_signal(number)
            said = read_all(reader)
        process.process.wait(timeout=20)
        assert b'"error":' in said, "an answer that is cut short says so"
        assert "Traceback" not in process.log
        for raw in clients:
            raw.close()


def test_limits_of_connections_are_checked() -> None:
    with pytest.raises(UsageError, match="--max-connections"):
        Limits(max_connections=32)
    with pytest.raises(UsageError, match="--header-s"):
        Limits(header_s=-1)


def test_too_few_file_descriptors_are_refused(bundle: Path) -> None:
    with pytest.raises(AssertionError, match="open files: received room for"), serving_process(bundle, files=60):
        pass


def test_the_key_is_asked_before_anything_is_read(bundle: Path) -> None:
    with serving_process(bundle, key=KEY) as process:
        head = POST + b"Content-Length: 1000\r\nExpect: 100-continue\r\n"
        for line in (
            b"",
            b"Authorization: Bearer x\r\n",
            b"Authorization: Bearer " + KEY.encode() * 2 + b"\r\n",
            b"Authorization: Bearer %b\r\nAuthorization: Bearer %b\r\n" % (b"x", KEY.encode()),
        ):
            with process.connect() as raw:
                raw.sendall(head + line + b"\r\n")
                assert raw.recv(1000).startswith(b"HTTP/1.1 401"), line
        with process.connect() as raw:
            raw.sendall(head + b"Authorization: bearer " + KEY.encode() + b"\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 100")


def test_sockets_that_are_reset_leave_no_trace(plain: Process) -> None:
    for data in (b"", b"GET /", post(ENDLESS), POST + b"Content-Length: 50\r\n\r\n{"):
        raw = plain.connect()
        raw.sendall(data)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        raw.close()
    assert plain.wait_healthy().status_code == 200
    assert "Traceback" not in plain.log
