"""The C++ runtime under AddressSanitizer and UndefinedBehaviorSanitizer: its C interface, faults, and fuzzed files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sinkrt import Session
from sinkrt.contract import MANIFEST_NAME

from tests.cpp.build import CppRuntime
from tests.cpp.test_runtime import check_c_interface
from tests.cpp.test_tokenizer import KINDS
from tests.cpp.test_tokenizer_kinds import KINDS as FILES
from tests.cpp.tokenizer_kinds import draw_file
from tests.runtime.layout_bundles import build_layout, kinds
from tests.runtime.toy import Toy, build_toy

RUNS = 4_000

pytestmark = pytest.mark.slow  # compiles the runtime anew, for a minute


def test_c_interface_and_faults(sanitized_cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    check_c_interface(sanitized_cpp_runtime, tmp_path)


def test_a_backend_that_fails(sanitized_cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "toy", Toy(chunk_size=4, batch=2, position_limit=100))
    done = sanitized_cpp_runtime.run(sanitized_cpp_runtime.programs / "faults", bundle, tmp_path)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


def test_text_and_states(sanitized_cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    cpp = sanitized_cpp_runtime
    bundle = build_toy(tmp_path / "toy", Toy(chunk_size=4))
    done = cpp.run(
        cpp.generate,
        bundle,
        "--prompt",
        "naïve 日本",
        "--max-tokens",
        "60",
        "--ignore-eos",
        "--stats",
        "--temperature",
        "1",
        "--top-p",
        "0.9",
        "--top-k",
        "50",
        "--save-state",
        tmp_path / "state",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("load")
    done = cpp.run(cpp.generate, bundle, "--load-state", tmp_path / "state", "--max-tokens", "5", "--ignore-eos")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_state(sanitized_cpp_runtime: CppRuntime, tmp_path: Path, kind: str) -> None:
    """Chunks, steps past three wraps, a saved state and one that goes on from it."""
    bundle = build_layout(tmp_path / "bundle", kinds(batch=1)[kind])
    options = ("--max-tokens", "30", "--ignore-eos")
    for more in (("--prompt", "ten bytes.", "--save-state"), ("--load-state",)):
        done = sanitized_cpp_runtime.run(sanitized_cpp_runtime.generate, bundle, *options, *more, tmp_path / "state")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["graph", "manifest", "state", "tokenizer"])
def test_fuzz(sanitized_cpp_runtime: CppRuntime, tmp_path: Path, name: str) -> None:
    """Mutations of good files by a fixed seed: read or refused, and nothing else."""
    bundle = build_toy(tmp_path / "toy", Toy(chunk_size=4, batch=2))
    files = [bundle / (MANIFEST_NAME if name == "manifest" else "decode.onnx")]
    if name == "manifest":
        for kind, layout in kinds().items():
            files.append(tmp_path / f"{kind}.json")
            files[-1].write_text(layout.to_json(), encoding="utf-8")
    if name == "state":
        files = [tmp_path / "empty.state", tmp_path / "full.state"]
        with Session.load(bundle, threads=1) as session:
            session.save_state(files[0])
            session.prefill([[1] * 30, [2] * 30])
            session.save_state(files[1])
    elif name == "tokenizer":
        files = []
        for kind in ("bytes", "llama3", "qwen2"):
            files.append(tmp_path / f"{kind}.json")
            KINDS[kind]().save(str(files[-1]))
        for kind in ("phi3", "some-bytes", "falcon", "tiktoken", "unigram", "unigram-bytes"):
            files.append(tmp_path / f"{kind}.json")
            files[-1].write_text(json.dumps(FILES[kind]()))
        for seed in range(12):
            files.append(tmp_path / f"{seed}.json")
            files[-1].write_text(json.dumps(draw_file(random.Random(seed))))
    runs = RUNS if name != "tokenizer" else RUNS // 8  # each of these reads 10 to 50 kB and encodes it
    done = sanitized_cpp_runtime.fuzz(name, bundle, runs, files)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{runs} runs\n"
