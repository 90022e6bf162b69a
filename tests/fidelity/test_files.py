"""Files that runs write and read: nothing but files is replaced, nothing is left behind, nothing waits forever."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from sinkexport.pipeline.bundle_writer import exchange_names, staged_bundle
from sinkexport.util.files import check_writable, write_whole
from sinkrt import Session, StateError, UsageError
from sinkrt.contract import MANIFEST_NAME
from sinkrt.errors import printable, problem
from sinkrt.state import check_state_target

from tests.cpp.build import CppRuntime, onnxruntime_library
from tests.runtime.toy import Toy, build_toy
from tests.support import COMMAND, export_model, run_cli

Save = Callable[[Path], str]
"""Saves a stream of a toy bundle to a path. Returns what went wrong; "" if nothing did."""


@pytest.fixture
def session(toy_bundle: Path) -> Iterator[Session]:
    with Session.load(toy_bundle, threads=1) as session:
        session.prefill([1, 2, 3])
        yield session


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(params=["python", "c++"])
def save(request: pytest.FixtureRequest, toy_bundle: Path) -> Save:
    """The two runtimes' way to write a state file."""
    if request.param == "python":
        return lambda path: run_cli("run", toy_bundle, "--prompt", "abc", "--max-tokens", 2, "--save-state", path).err
    cpp: CppRuntime = request.getfixturevalue("cpp_runtime")

    def with_cpp(path: Path) -> str:
        done = _run_cpp(cpp, toy_bundle, "--ids", "-", "--max-tokens", "2", "--save-state", path, stdin="1 2 3")
        assert done.returncode in (0, 2)
        return done.stderr

    return with_cpp


def _run_cpp(cpp: CppRuntime, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(cpp.generate), *map(str, arguments), "--onnxruntime", str(onnxruntime_library())],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_link_stays_a_link(save: Save, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "state").symlink_to("real/file")  # which is yet to be made
    for _ in range(2):
        assert save(tmp_path / "state") == ""
        assert (tmp_path / "state").is_symlink()
        assert not (tmp_path / "real" / "file").is_symlink()
        assert load_file(tmp_path / "state")["position"][0] > 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "real", "state"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle", "no folder"])
def test_what_is_no_file_is_refused_before_the_run(save: Save, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to("target")
    else:
        path = tmp_path / "missing" / "state"
    before = path.lstat() if kind != "no folder" else None
    message = save(path)
    assert "received" in message and "expected a file that can be written" in message
    assert message.count("\n") == 1
    assert kind == "no folder" or stat.S_IFMT(path.lstat().st_mode) == stat.S_IFMT(before.st_mode)  # type: ignore[union-attr]
    assert list(tmp_path.glob(".*")) == []


def test_leftovers_of_killed_runs_go_and_those_of_living_ones_stay(save: Save, tmp_path: Path) -> None:
    dead = tmp_path / ".state.0123abcd.partial"
    dead.write_bytes(b"half of it")
    names = (".other.0123abcd.partial", ".state.0123abcd.partial.txt", ".state.zz.partial")
    others = [tmp_path / name for name in names]
    for other in others:
        other.write_bytes(b"mine")
    living = tmp_path / ".state.89abcdef.partial"
    with living.open("wb") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        assert save(tmp_path / "state") == ""
        assert not dead.exists()
        assert living.exists() and all(other.exists() for other in others)
    assert save(tmp_path / "state") == ""
    assert not living.exists()


def saving_often(bundle: Path, state: Path, stderr: Any) -> subprocess.Popen[bytes]:
    """A run of 4,000 tokens that saves its stream every 10."""
    options = ("--prompt", "a", "--ignore-eos", "--max-tokens", "4000", "--save-every", "10", "--save-state", state)
    return subprocess.Popen([*COMMAND, "run", bundle, *options], stdout=subprocess.PIPE, stderr=stderr)


def test_a_save_on_the_way_that_fails_is_a_warning(toy_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    process = saving_often(toy_bundle, folder / "state", stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(400)  # some saves have been made
    moved = folder.rename(tmp_path / "gone")
    out, err = process.communicate(timeout=120)
    lines = err.decode().splitlines()
    assert len(out) > 3000, "the stream must go on"
    assert lines[0].startswith("sinkexport: warning: not saved at position ")
    assert lines[-1].startswith("sinkexport: error: state file: received"), "the last save, which nothing follows"
    assert process.returncode == 2
    assert load_file(moved / "state")["position"][0] >= 10


def test_a_log_that_cannot_be_written_ends_no_stream(toy_bundle: Path, tmp_path: Path) -> None:
    """The disk that a save does not fit on is often the log's as well."""
    folder = tmp_path / "there"
    folder.mkdir()
    with Path("/dev/full").open("wb") as full:
        process = saving_often(toy_bundle, folder / "state", stderr=full)
    assert process.stdout is not None
    process.stdout.read(400)
    folder.rename(tmp_path / "gone")
    out, _ = process.communicate(timeout=120)
    assert len(out) > 3000, "the stream must go on"
    assert process.returncode == 2, "the last save"


def test_bad_input_is_exit_code_2_wherever_the_message_goes() -> None:
    for log in ("/dev/full", "/dev/null"):
        with Path(log).open("wb") as file:
            assert subprocess.run([*COMMAND, "inspect"], stderr=file, check=False, timeout=60).returncode == 2


def test_a_pipe_as_state_or_manifest_does_not_hang(toy_bundle: Path, tmp_path: Path, cpp_runtime: CppRuntime) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with Session.load(toy_bundle, threads=1) as session, pytest.raises(StateError, match="pipe"):
        session.load_state(pipe)
    done = _run_cpp(cpp_runtime, toy_bundle, "--load-state", pipe)
    assert done.returncode == 2 and "not a regular file" in done.stderr
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    os.mkfifo(bundle / MANIFEST_NAME)
    run_cli("inspect", bundle).refusal("manifest.json")
    done = _run_cpp(cpp_runtime, bundle)
    assert done.returncode == 2 and "manifest.json" in done.stderr


@pytest.mark.parametrize("spoilt", ["recent_ids", "beyond the vocabulary"])
def test_a_state_without_the_ids_of_its_tokens(
    session: Session, toy_bundle: Path, tmp_path: Path, spoilt: str, cpp_runtime: CppRuntime
) -> None:
    session.save_state(tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    tensors["recent_ids"][0, 1] = -1 if spoilt == "recent_ids" else 10**6
    from safetensors import safe_open

    with safe_open(tmp_path / "state", framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "bad", metadata)
    with pytest.raises(StateError, match="recent_ids"):
        session.load_state(tmp_path / "bad")
    assert int(session.position[0]) == 3, "a refused load changes nothing"
    resumed = run_cli("run", toy_bundle, "--load-state", tmp_path / "bad", "--resume", "--max-tokens", 2)
    resumed.refusal("recent_ids")
    done = _run_cpp(cpp_runtime, toy_bundle, "--load-state", tmp_path / "bad")
    assert done.returncode == 2 and "recent_ids" in done.stderr


# --- result files and bundles ----------------------------------------------------------------------------------------


def test_results_follow_links_and_may_go_to_pipes(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old", encoding="utf-8")
    (tmp_path / "link.json").symlink_to("real.json")
    check_writable(tmp_path / "link.json", "--json")
    write_whole(tmp_path / "link.json", "new", "--json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text(encoding="utf-8") == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe, "--json")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, "through", "--json")
    reader.join(timeout=30)
    assert read == [b"through"]
    with pytest.raises(UsageError, match="--save-state"):
        check_state_target(pipe, "--save-state")


def _old_bundle(folder: Path) -> Path:
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text("old", encoding="utf-8")
    return folder


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_bundle_is_replaced_and_never_missing(tmp_path: Path, can_exchange: bool) -> None:
    exchange = exchange_names if can_exchange else lambda _a, _b: False
    out = _old_bundle(tmp_path / "bundle")
    seen: set[str] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            try:
                seen.add((out / MANIFEST_NAME).read_text(encoding="utf-8"))
            except FileNotFoundError:
                seen.add("missing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(100):
        with staged_bundle(out, overwrite=True, exchange=exchange) as stage:
            (stage / MANIFEST_NAME).write_text(f"new {i}", encoding="utf-8")
    stop.set()
    watcher.join()
    assert (out / MANIFEST_NAME).read_text(encoding="utf-8") == "new 99"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    if can_exchange and sys.platform == "linux":
        assert "missing" not in seen


def test_a_bundle_behind_a_link(tmp_path: Path) -> None:
    _old_bundle(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    with staged_bundle(tmp_path / "current", overwrite=True) as stage:
        (stage / MANIFEST_NAME).write_text("new", encoding="utf-8")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / MANIFEST_NAME).read_text(encoding="utf-8") == "new"


def test_folders_of_killed_exports(tmp_path: Path) -> None:
    dead = tmp_path / ".bundle.partial-abcd_123"
    dead.mkdir()
    (dead / "weights.bin").write_bytes(b"half")
    aside = tmp_path / ".bundle.partial-zyxw0987-old"  # killed between the two renames
    _old_bundle(aside)
    mine = tmp_path / ".bundle.partial-mine"
    mine.mkdir()
    with pytest.raises(UsageError, match="a bundle"), staged_bundle(tmp_path / "bundle"):
        pass
    assert (tmp_path / "bundle" / MANIFEST_NAME).read_text(encoding="utf-8") == "old"
    assert not dead.exists() and mine.exists()
    with staged_bundle(tmp_path / "bundle", overwrite=True) as living:
        with staged_bundle(tmp_path / "bundle", overwrite=True) as other:
            assert living.exists()
            (other / MANIFEST_NAME).write_text("other", encoding="utf-8")
        (living / MANIFEST_NAME).write_text("living", encoding="utf-8")
    assert (tmp_path / "bundle" / MANIFEST_NAME).read_text(encoding="utf-8") == "living"


# --- names and descriptors -------------------------------------------------------------------------------------------


def test_names_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    assert problem("x", received="\x1b[2J\n\u202e\ud800", expected="é 日本 \u200d", fix="y") == (
        "x: received \\x1b[2J\\n\\u202e\\ud800, expected é 日本 \u200d; y"
    )
    assert printable("plain ü") == "plain ü"
    bundle = build_toy(tmp_path / "toy")
    manifest = bundle / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"name": "toy"', '"name": "toy\\u001b[31m\\u0007"'))
    shown = run_cli("inspect", bundle).succeeded().out
    assert "\x1b" not in shown and "\x07" not in shown
    assert "toy\\x1b[31m (ToyForCausalLM" in shown


@pytest.mark.parametrize(
    ("shell", "code", "message"),
    [
        ("run {b} --max-tokens 2 <&-", 2, "stdin: received no text"),
        ("run {b} --chat <&-", 0, ""),
        ("run {b} --prompt a --max-tokens 2 <&-", 0, ""),
        ("run {b} --prompt a --max-tokens 2 >&-", 2, "stdout: received a closed one"),
        ("inspect {b} >&-", 2, "stdout: received a closed one"),
        ("run {b} --prompt a --max-tokens 2 2>&-", 0, ""),
        ("run {b} --prompt a --max-tokens 2 --save-state {s} 2>&- <&-", 0, ""),
        ("run {b} --prompt a --threads 100000000", 2, "threads: received 100000000, expected 1 .. 1024"),
        ("export m -o {s} --window 99999999999", 2, "window_size: received 99999999999"),
        ("export m -o {s} --sink-tokens 99999999999", 2, "num_sink_tokens: received 99999999999"),
        ("export m -o {s} --batch 99999999999", 2, "batch: received 99999999999"),
        ("export m -o {s} --chunk 99999999999", 2, "chunk_size: received 99999999999"),
    ],
)
def test_closed_descriptors_and_absurd_numbers(
    toy_bundle: Path, tmp_path: Path, shell: str, code: int, message: str
) -> None:
    line = " ".join([*COMMAND, shell.format(b=toy_bundle, s=tmp_path / "s")])
    done = subprocess.run(line, shell=True, capture_output=True, timeout=60, check=False)
    err = done.stderr.decode()
    assert done.returncode == code, err
    assert message in err and err.count("\n") == (1 if message else 0)


def test_a_cache_that_no_memory_holds(tmp_path: Path) -> None:

    from tests.exporter.tiny_models import tiny_model

    with pytest.raises(UsageError, match=r"cache: received .* GB of keys and values"):
        export_model(tiny_model("llama"), tmp_path / "out", window_size=2**24, batch=2**12)
    assert list(tmp_path.iterdir()) == []


def test_a_window_of_another_size_than_the_states(tmp_path: Path) -> None:
    """The manifest is all that a runtime knows: a lie about S or W would move the stream's positions."""
    bundle = build_toy(tmp_path / "toy", Toy(window_size=6))
    manifest = bundle / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"window_size": 6', '"window_size": 8'))
    with pytest.raises(Exception, match=r"tokens of state 'window_k\.0': received 6, expected 8"):
        Session.load(bundle)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_while_an_export_works_stays(toy_bundle: Path, tmp_path: Path, overwrite: bool) -> None:
    """An export takes minutes: another one, or a user, may have written there meanwhile."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="not a bundle"), staged_bundle(out, overwrite=overwrite) as stage:
        shutil.copytree(toy_bundle, stage, dirs_exist_ok=True)
        out.mkdir()
        (out / "precious").write_text("mine")
    assert (out / "precious").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_comes_while_an_export_works_stays(toy_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(toy_bundle, out)
    with pytest.raises(UsageError, match="not a bundle"), staged_bundle(out, overwrite=True) as stage:
        shutil.rmtree(out)
        out.write_text("mine")
    assert out.read_text() == "mine" and not stage.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_exports_to_one_folder_the_second_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--overwrite"), staged_bundle(out) as slow:
        (slow / "slow").touch()
        with staged_bundle(out) as fast:
            shutil.copytree(toy_bundle, fast, dirs_exist_ok=True)
    assert (out / MANIFEST_NAME).is_file() and not (out / "slow").exists()


def test_overwrite_leaves_a_bundle_with_files_of_others(toy_bundle: Path, tmp_path: Path) -> None:
    """A stream of weeks that was saved inside the bundle must not go with it; engines of its graphs may."""
    out = tmp_path / "out"
    shutil.copytree(toy_bundle, out)
    (out / "engines").mkdir()
    (out / "engines" / "decode.engine").touch()
    (out / "saved").mkdir()
    (out / "saved" / "stream").touch()
    with pytest.raises(UsageError, match="'saved/stream'"), staged_bundle(out, overwrite=True):
        pytest.fail("refused before any work")
    (out / "saved" / "stream").unlink()
    with staged_bundle(out, overwrite=True) as stage:
        (stage / MANIFEST_NAME).write_text("no manifest")
    assert [path.name for path in out.iterdir()] == [MANIFEST_NAME]
    (out / "x").touch()
    with staged_bundle(out, overwrite=True) as stage:  # a broken one
        (stage / MANIFEST_NAME).touch()
    assert [path.name for path in out.iterdir()] == [MANIFEST_NAME]


def test_a_place_that_cannot_be_renamed_is_refused_before_the_export() -> None:
    with pytest.raises(UsageError, match="is mounted"), staged_bundle(Path("/proc")):
        pytest.fail("refused before any work")


def test_a_verification_that_never_ends_is_refused(toy_bundle: Path) -> None:
    run_cli("verify", toy_bundle, "--against", "nothing", "--wraps", 10**12).refusal("--wraps: received 1000000000000")
