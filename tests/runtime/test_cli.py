"""The command line: text on stdout as it is produced, one line for every error, exit codes."""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sinkexport.cli import COMMANDS, main
from sinkrt import Session

from tests.runtime.toy import BOS, EOS, Toy, build_toy, rehash
from tests.support import COMMAND, Result, run_cli, run_cli_apart


def greedy(bundle: Path, ids: list[int], count: int) -> str:
    """What `run` must print for these ids: the text of greedy decoding, end of text ignored."""
    with Session.load(bundle, threads=1) as session:
        logits = session.prefill(ids)
        answer = []
        for _ in range(count):
            answer.append(int(logits[0].argmax()))
            logits = session.step(answer[-1:])
        return session.tokenizer.decode(answer)


# --- overview --------------------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    for flag in ("--help", "-h"):
        result = run_cli(flag)
        assert result.code == 0
        assert all(name in result.out and text in result.out for name, text in COMMANDS.items())


def test_help_of_run_and_inspect() -> None:
    for command in ("run", "inspect"):
        result = run_cli(command, "--help")
        assert result.code == 0
        assert result.out.startswith(f"Usage: sinkexport {command} [OPTIONS] DIR")


def test_version() -> None:
    from sinkexport import __version__

    assert run_cli("--version").out == f"sinkexport, version {__version__}\n"


def test_the_entry_point_is_main() -> None:
    found = importlib.metadata.entry_points(group="console_scripts", name="sinkexport")
    if not found:
        pytest.skip("not installed: running from the source folder")
    assert next(iter(found)).load() is main


# --- run -------------------------------------------------------------------------------------------------------------


def test_prompt(toy_bundle: Path) -> None:
    result = run_cli("run", toy_bundle, "--prompt", "Hello", "--max-tokens", 25, "--ignore-eos")
    assert result == Result(0, greedy(toy_bundle, list(b"Hello"), 25) + "\n", "")


def test_stdin_is_a_prompt(toy_bundle: Path) -> None:
    text = "One line\nand anöther 🙂\n\nno line break"
    result = run_cli("run", toy_bundle, "--max-tokens", 25, "--ignore-eos", stdin=text.encode())
    assert result == Result(0, greedy(toy_bundle, list(text.encode()), 25) + "\n", "")


def test_stdin_longer_than_any_buffer(toy_bundle: Path) -> None:
    text = b"0123456789abcdef" * 3000 + b"\n" + b"x" * 9000
    result = run_cli("run", toy_bundle, "--max-tokens", 5, "--ignore-eos", "--stats", stdin=text)
    with Session.load(toy_bundle, threads=1) as session:
        assert result.out == "".join(session.generate(list(text), max_tokens=5, ignore_eos=True)) + "\n"
    assert f"position {len(text) + 5}" in result.err


def test_stdin_is_fed_as_it_arrives(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is fed before the next is sent, but for its last token: only the end of the input starts the answer."""
    line, fed = b"a line of text\n", []
    reader, writer = os.pipe()
    prefill = Session.prefill

    def recorded(self: Session, ids: Any) -> Any:
        logits = prefill(self, ids)
        fed.append(int(self.position[0]))
        return logits

    def send() -> None:
        for number in range(1, 6):
            os.write(writer, line)
            deadline = time.monotonic() + 10
            while fed[-1:] != [number * len(line) - 1] and time.monotonic() < deadline:
                time.sleep(0.005)
        os.close(writer)

    monkeypatch.setattr(Session, "prefill", recorded)
    sender = threading.Thread(target=send)
    sender.start()
    with os.fdopen(reader) as stdin:
        result = run_cli("run", toy_bundle, "--max-tokens", 3, "--ignore-eos", stdin=stdin)
    sender.join()
    assert fed == [*(number * len(line) - 1 for number in range(1, 6)), 5 * len(line)]
    assert result == Result(0, greedy(toy_bundle, list(5 * line), 3) + "\n", "")


def test_every_piece_is_flushed(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "argv", ["sinkexport", "run", str(toy_bundle), "--prompt", "Hi", "--max-tokens", "20"])
    monkeypatch.setattr(sys, "stdout", Terminal())
    with pytest.raises(SystemExit):
        main()
    with Session.load(toy_bundle, threads=1) as session:
        pieces = list(session.generate("Hi", max_tokens=20))
    assert flushed[: len(pieces)] == list(itertools.accumulate(pieces))


def test_an_endless_run_shows_its_text_while_it_goes_on(toy_bundle: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", str(toy_bundle), "--prompt", "a", "--ignore-eos"], stdout=subprocess.PIPE
    )
    assert process.stdout
    for _ in range(5):
        assert os.read(process.stdout.fileno(), 1000) and process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_sampling_options_arrive(toy_bundle: Path) -> None:
    options = {"temperature": 1.4, "top_k": 60, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5}
    flags = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = run_cli("run", toy_bundle, "--prompt", "Hi", "--max-tokens", 30, "--ignore-eos", *flags)
    with Session.load(toy_bundle, threads=1) as session:
        want = "".join(session.generate("Hi", max_tokens=30, ignore_eos=True, **options))  # type: ignore[arg-type]
    assert result.out == want + "\n"
    assert want != greedy(toy_bundle, list(b"Hi"), 30)


def test_stats(toy_bundle: Path) -> None:
    result = run_cli("run", toy_bundle, "--prompt", "Hi", "--max-tokens", 30, "--ignore-eos", "--stats", "--threads", 1)
    assert result.code == 0
    assert result.err.count("\n") == 1
    for part in ("tokens, ", "ms/token median", "ms p99", "position 32", "5.0 windows of 6", "memory ", "state "):
        assert part in result.err


def test_a_stream_in_two_runs_is_the_stream_in_one(toy_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    whole = run_cli("run", toy_bundle, "--prompt", "abcdefghijkl", "--max-tokens", 12, "--ignore-eos")
    first = run_cli("run", toy_bundle, "--prompt", "abcdefgh", "--max-tokens", 1, "--ignore-eos", "--save-state", state)
    assert first.code == 0
    with Session.load(toy_bundle, threads=1) as session:
        session.prefill(list(b"abcdefgh"))
        session.save_state(state)
    second = run_cli("run", toy_bundle, "--prompt", "ijkl", "--max-tokens", 12, "--ignore-eos", "--load-state", state)
    assert second == whole


def test_save_state_holds_what_was_fed_and_said(toy_bundle: Path, tmp_path: Path) -> None:
    run_cli("run", toy_bundle, "--prompt", "abc", "--max-tokens", 7, "--ignore-eos", "--save-state", tmp_path / "state")
    with Session.load(toy_bundle, threads=1) as session:
        session.load_state(tmp_path / "state")
        assert session.position[0] == 10


def test_a_killed_run_resumes_from_its_last_save(toy_bundle: Path, tmp_path: Path) -> None:
    """kill -9 in mid-answer, then --resume: the stream is the one of a run that nobody disturbed."""
    state, options = tmp_path / "state", ("--ignore-eos", "--temperature", "0.9", "--seed", "4")
    process = subprocess.Popen(
        [*COMMAND, "run", str(toy_bundle), "--prompt", "a", *options, "--save-state", str(state), "--save-every", "20"],
        stdout=subprocess.DEVNULL,
    )
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with Session.load(toy_bundle, threads=1) as session:
        session.load_state(state)
        reached = int(session.position[0])
        assert reached >= 21
        run_cli(
            "run", toy_bundle, "--resume", "--load-state", state, "--save-state", state, "--max-tokens", 30, *options
        )
        session.load_state(state)
        resumed = session.recent_ids().tolist(), session.logits.copy()
        session.reset()
        for _ in session.generate("a", max_tokens=reached + 29, ignore_eos=True, temperature=0.9, seed=4):
            pass
        assert session.recent_ids().tolist() == resumed[0]
        assert np.array_equal(session.logits, resumed[1])


def test_stop_ends_an_answer_before_the_text(toy_bundle: Path) -> None:
    options = ("run", toy_bundle, "--prompt", "Hello", "--max-tokens", 60, "--ignore-eos")
    whole = run_cli(*options).out
    stop = whole[20:23]
    assert run_cli(*options, "--stop", "nowhere", "--stop", stop).out == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["ctrl-c", "terminated", "hung up"],
)
def test_a_stopped_run_saves_its_state(toy_bundle: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    state = tmp_path / "state"
    process = subprocess.Popen(
        [*COMMAND, "run", str(toy_bundle), "--prompt", "a", "--ignore-eos", "--save-state", str(state), "--stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # whatever the tests' own terminal has said
    )
    assert process.stdout
    os.read(process.stdout.fileno(), 1)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    lines = err.decode().splitlines()
    assert "ms/token" in lines[0]
    assert lines[1:] == (["sinkexport: error: interrupted"] if code == 130 else [])
    with Session.load(toy_bundle, threads=1) as session:
        session.load_state(state)
        assert session.position[0] > 1


def test_a_run_that_fed_nothing_keeps_the_old_state(toy_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    run_cli("run", toy_bundle, "--prompt", "abc", "--max-tokens", 1, "--save-state", state)
    before = state.read_bytes()
    run_cli("run", toy_bundle, "--prompt", "", "--save-state", state).refusal("no tokens")
    assert state.read_bytes() == before


def test_a_reader_that_leaves(toy_bundle: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", str(toy_bundle), "--prompt", "a", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""


def test_a_terminal_that_knows_ascii_only(toy_bundle: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = run_cli_apart("run", toy_bundle, "--prompt", "Hello", "--max-tokens", 60, "--ignore-eos", env=environment)
    assert result.code == 0
    assert result.out.isascii() and "?" in result.out


# --- chat ------------------------------------------------------------------------------------------------------------


def chat_ids(bundle: Path, messages: list[str], count: int, system: str | None = None) -> tuple[list[str], int]:
    """Answers and final position of a chat whose whole history is one list of ids, as the toy's template has it."""
    answers, position = [], 0
    with Session.load(bundle, threads=1) as session:
        for turn, message in enumerate(messages):
            opening = [BOS] if system is None else [*f"[system]{system}".encode(), EOS, *b"\n"]
            ids = [EOS, *b"\n"] if turn else opening
            ids += [*f"[user]{message}".encode(), EOS, *b"\n[assistant]"]
            logits, answer = session.prefill(ids), []
            while len(answer) < count and (token := int(logits[0].argmax())) != EOS:
                answer.append(token)
                logits = session.step([token])
            answers.append(session.tokenizer.decode(answer))
            position = int(session.position[0])
    return answers, position


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_piped(toy_bundle: Path, system: str | None) -> None:
    """Each line gets an answer, the history is the ring: nothing is fed twice."""
    messages = ["Hello there", "and again 🙂", "bye"]
    flags = [] if system is None else ["--system", system]
    stdin = "Hello there\n\n   \nand again 🙂\r\nbye".encode()  # blank lines are no messages
    result = run_cli("run", toy_bundle, "--chat", "--max-tokens", 12, "--stats", *flags, stdin=stdin)
    answers, position = chat_ids(toy_bundle, messages, 12, system)
    assert result.code == 0
    assert result.out == "".join(answer + "\n" for answer in answers)
    assert f"position {position}" in result.err


def test_chat_goes_on_after_a_restart(toy_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = run_cli("run", toy_bundle, "--chat", "--max-tokens", 9, "--save-state", state, stdin=b"one\n")
    second = run_cli("run", toy_bundle, "--chat", "--max-tokens", 9, "--load-state", state, stdin=b"two\n")
    answers, _ = chat_ids(toy_bundle, ["one", "two"], 9)
    assert first.out + second.out == "".join(answer + "\n" for answer in answers)
    late = run_cli("run", toy_bundle, "--chat", "--load-state", state, "--system", "x", stdin=b"two\n")
    late.refusal("--system")


def test_chat_on_a_terminal(toy_bundle: Path) -> None:
    """Answers come while the conversation goes on, with a prompt before every message."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "run", str(toy_bundle), "--chat", "--max-tokens", "4"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    assert process.stdout and process.stderr
    answers, _ = chat_ids(toy_bundle, ["one", "two"], 4)
    for message, answer in zip(("one", "two"), answers, strict=True):
        assert os.read(process.stderr.fileno(), 10) == b"> "
        os.write(ours, message.encode() + b"\n")
        got = b""
        while len(got) < len(answer.encode()) + 1:
            got += os.read(process.stdout.fileno(), 100)
        assert got.decode() == answer + "\n"
    os.write(ours, b"\x04")  # Ctrl-D
    assert process.wait(timeout=60) == 0
    os.close(ours)


def test_chat_without_messages(toy_bundle: Path) -> None:
    assert run_cli("run", toy_bundle, "--chat", stdin=b"\n\n") == Result(0, "", "")


def test_chat_needs_a_template(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle", chat=False)
    run_cli("run", bundle, "--chat", stdin=b"hi\n").refusal("chat template")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("--frobnicate",), "No such option"),
        (("run",), "Missing argument 'DIR'"),
        (("run", "BUNDLE", "--frobnicate"), "--frobnicate"),
        (("run", "BUNDLE", "--max-tokens", "many"), "--max-tokens"),
        (("run", "BUNDLE", "--max-tokens", "0"), "--max-tokens"),
        (("run", "BUNDLE", "--backend", "abacus"), "--backend"),
        (("run", "BUNDLE", "--backend", "ort-cuda", "--prompt", "a"), "sinkexport[cuda]"),
        (("run", "BUNDLE", "--backend", "tensorrt", "--prompt", "a"), "run 'sinkexport build' on this machine"),
        (("run", "BUNDLE", "--threads", "0", "--prompt", "a"), "threads: received 0"),
        (("run", "BUNDLE", "--prompt", "a", "--temperature", "-1"), "temperature: received -1.0"),
        (("run", "BUNDLE", "--prompt", "a", "--temperature", "nan"), "temperature: received nan"),
        (("run", "BUNDLE", "--prompt", "a", "--temperature", "1e300"), "temperature: received 1e+300"),
        (("run", "BUNDLE", "--prompt", "a", "--repetition-penalty", "1e-300"), "repetition_penalty: received 1e-300"),
        (("run", "BUNDLE", "--prompt", "a", "--top-k", "9" * 30), "top_k: received 9999"),
        (("run", "BUNDLE", "--prompt", "a", "--seed", "-1"), "seed: received -1"),
        (("run", "BUNDLE", "--prompt", "a", "--seed", str(2**64)), "seed: received 18446744073709551616"),
        (("bench", "BUNDLE", "--seed", "-1"), "'--seed'"),
        (("verify", "BUNDLE", "--against", "x", "--seed", "-1"), "'--seed'"),
        (("run", "BUNDLE", "--prompt", "a", "--top-p", "2"), "top_p: received 2.0"),
        (("run", "BUNDLE", "--prompt", "a", "--top-k", "-1"), "top_k: received -1"),
        (("run", "BUNDLE", "--prompt", "a", "--repetition-penalty", "0"), "repetition_penalty: received 0.0"),
        (("run", "BUNDLE", "--prompt", ""), "prompt: received no tokens"),
        (("run", "BUNDLE", "--prompt", "\udcff"), "valid UTF-8"),
        (("run", "BUNDLE", "--prompt", "a", "--chat"), "--prompt"),
        (("run", "BUNDLE", "--prompt", "a", "--system", "b"), "--system"),
        (("run", "BUNDLE", "--prompt", "a", "--load-state", "/nowhere/state"), "state file"),
        (("run", "BUNDLE", "--prompt", "a", "--save-state", "/nowhere/state"), "--save-state"),
        (("run", "BUNDLE", "--prompt", "a", "--save-every", "5"), "--save-every: received without --save-state"),
        (("run", "BUNDLE", "--prompt", "a", "--save-every", "0"), "--save-every"),
        (("run", "BUNDLE", "--resume"), "--resume: received without --load-state"),
        (("run", "BUNDLE", "--resume", "--load-state", "x", "--prompt", "a"), "--resume: received with --chat or"),
        (("run", "BUNDLE", "--prompt", "a", "--stop", ""), "stop: received"),
        (("run", "BUNDLE", "--chat", "--pin-system"), "--pin-system: received without --system"),
        (("run", "BUNDLE", "--chat", "--system", "Be brief.", "--pin-system"), "--sink-tokens 25"),
        (("run", "/nowhere", "--prompt", "a"), "manifest.json"),
        (("inspect",), "Missing argument"),
        (("inspect", "/nowhere"), "which is not there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(toy_bundle: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run_cli(*(str(toy_bundle) if argument == "BUNDLE" else argument for argument in arguments))
    result.refusal(message)
    assert result.out == ""


def test_no_text_on_stdin(toy_bundle: Path) -> None:
    run_cli("run", toy_bundle).refusal("stdin: received no text")


def test_text_for_a_bundle_of_ids(tmp_path: Path) -> None:
    run_cli("run", build_toy(tmp_path / "b", tokenizer=False), "--prompt", "a").refusal("tokenizer")


def test_two_streams_cannot_print_one_text(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle", Toy(batch=2))
    for arguments in (["--prompt", "a"], ["--chat"], []):
        run_cli("run", bundle, *arguments).refusal("run: received a bundle of 2 streams, expected batch 1")


def test_corrupt_weights_are_named(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle")
    weights = bytearray((bundle / "weights.bin").read_bytes())
    weights[100] ^= 1
    (bundle / "weights.bin").write_bytes(weights)
    run_cli("run", bundle, "--prompt", "a").refusal("weights.bin: received sha256")


def test_a_state_of_another_bundle(toy_bundle: Path, tmp_path: Path) -> None:
    other = build_toy(tmp_path / "other", Toy(seed=1))
    run_cli("run", other, "--prompt", "a", "--max-tokens", 1, "--save-state", tmp_path / "state")
    run_cli("run", toy_bundle, "--prompt", "a", "--load-state", tmp_path / "state").refusal("fingerprint")


def test_the_position_limit_ends_a_run_with_its_text_shown(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle", Toy(position_limit=12))
    result = run_cli("run", bundle, "--prompt", "abcd", "--ignore-eos")
    result.refusal("position: received 12")


def test_a_file_that_may_not_be_read(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *mode: str, **options: Any) -> Any:
        if path.name == "weights.bin":
            raise PermissionError(13, "Permission denied", path.name)
        return opened(path, *mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    run_cli("run", toy_bundle, "--prompt", "a").refusal("Permission denied: 'weights.bin'")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "not enough memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'sinkexport[export]'"),
        (ModuleNotFoundError("No module named 'onnx.reference'", name="onnx.reference"), 2, "sinkexport[export]"),
        (ZeroDivisionError("division\nby zero"), 70, "unexpected ZeroDivisionError: division by zero"),
        (ModuleNotFoundError("No module named 'zlib'", name="zlib"), 70, "unexpected ModuleNotFoundError"),
    ],
    ids=repr,
)
def test_other_errors(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Session, "load", fail)
    result = run_cli("run", "anything", "--prompt", "a")
    result.refusal(message, code=code)
    debug = run_cli("--debug", "run", "anything", "--prompt", "a")
    assert debug.code == code
    assert "Traceback" in debug.err and type(error).__name__ in debug.err
    assert debug.err.splitlines()[-1] + "\n" == result.err


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_a_bundle(toy_bundle: Path) -> None:
    result = run_cli("inspect", toy_bundle)
    assert (result.code, result.err) == (0, "")
    weights = (toy_bundle / "weights.bin").stat().st_size
    parts = (
        "toy (ToyForCausalLM",
        "1 x 4 query heads, 2 key heads of 8",
        "258 tokens",
        "2 sinks + window of 6",
        "decode.onnx, 1 token(s)",
        "tokenizer.json, chat template",
        f"{weights:,}",
        "all, forever",
    )
    for part in parts:
        assert part in result.out, part


def test_inspect_shows_what_is_missing(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle", tokenizer=False)
    (bundle / "weights.bin").unlink()
    (bundle / "decode.onnx").write_bytes(b"abc")
    result = run_cli("inspect", bundle)
    assert result.code == 0
    rows = {line.split()[0]: line for line in result.out.splitlines() if line}
    assert rows["weights.bin"].rstrip().endswith("missing")
    assert rows["decode.onnx"].rstrip().endswith("has 3 bytes")
    assert "none: token ids only" in rows["tokenizer"]


def test_inspect_as_json(toy_bundle: Path) -> None:
    result = run_cli("inspect", toy_bundle, "--json")
    assert json.loads(result.out) == json.loads((toy_bundle / "manifest.json").read_text(encoding="utf-8"))


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle")
    (bundle / "[red]notes.txt").write_text("x", encoding="utf-8")
    rehash(bundle)
    assert "[red]notes.txt" in run_cli("inspect", bundle).out


def test_inspect_families() -> None:
    from sinkexport.families import describe

    table, rows = run_cli("inspect", "families"), json.loads(run_cli("inspect", "families", "--json").out)
    assert table.code == 0
    assert [row["family"] for row in rows] == [family.family for family in describe()]
    assert all(row["family"] in table.out for row in rows)


def test_a_bundle_named_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_toy(tmp_path / "families")
    monkeypatch.chdir(tmp_path)
    assert "ToyForCausalLM" in run_cli("inspect", "families").out


def test_an_option_out_of_range_is_refused_before_text_is_read_or_a_state_is_saved(tmp_path: Path) -> None:
    bundle, state = build_toy(tmp_path / "b", Toy()), tmp_path / "state"
    for arguments in ((), ("--chat",)):
        done = run_cli(
            "run", bundle, *arguments, "--repetition-penalty", "1e-300", "--save-state", state, stdin=b"text\n"
        )
        assert (done.code, done.out) == (2, "")
        assert "repetition_penalty: received 1e-300" in done.err
        assert not state.exists()
