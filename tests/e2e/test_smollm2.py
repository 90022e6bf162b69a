"""The main job on a real model: SmolLM2-135M-Instruct, from GGUF to text past the window, on the CPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sinkexport.sources import LoadedModel, load_model
from sinkrt import Session

from tests.cpp.build import CppRuntime
from tests.cpp.probe import Probe
from tests.cpp.test_tokenizer import TEXTS, noise
from tests.real_model import smollm2_file
from tests.support import run_cli, run_cli_apart

pytestmark = pytest.mark.slow

WINDOW = 28
CHARACTERS = "naïve café — 日本語のテキスト, العربية, हिन्दी, 👩‍🚀🚀 e\u0301 done"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "bundle"
    run_cli("export", smollm2_file(), "-o", folder, "--window", WINDOW).succeeded()
    return folder


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(smollm2_file()))


def test_bundle_facts(bundle: Path) -> None:
    facts = json.loads(run_cli("inspect", bundle, "--json").succeeded().out)
    assert facts["model"]["num_layers"] == 30
    assert facts["model"]["num_parameters"] == 134_515_008
    weights = facts["files"]["weights.bin"]["bytes"]
    assert 538.0e6 < weights < 538.5e6  # the tied embedding once


def test_tokenizer_is_the_source_s_and_chats_are_those_of_transformers(bundle: Path, loaded: LoadedModel) -> None:
    """transformers takes another split for GGUF's 'smollm' (digits), so that only what it renders is compared."""
    ours, source, file = Session.load(bundle).tokenizer, loaded.tokenizer, smollm2_file()
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    messages = [
        {"role": "user", "content": CHARACTERS},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "more"},
    ]
    assert source is not None
    assert ours.encode(CHARACTERS) == source.encode(CHARACTERS)
    assert ours.render_chat(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    decoder = ours.streaming_decoder()
    pieces = [decoder.push(token) for token in ours.encode(CHARACTERS, special=False)]
    assert "".join(pieces) + decoder.flush() == CHARACTERS
    assert not any("\ufffd" in piece for piece in pieces)


def test_dense_parity_and_greedy_text(bundle: Path, loaded: LoadedModel) -> None:
    session = Session.load(bundle)
    ids = session.tokenizer.encode("The quick brown fox jumps over the lazy dog. In the beginning God created")
    with torch.no_grad():
        dense = loaded.model(torch.tensor([ids])).logits[0].numpy()
    for token, want in zip(ids, dense, strict=True):
        got = session.step([token])[0]
        assert np.abs(got - want).max() < 2e-3
        assert int(got.argmax()) == int(want.argmax())
    generated: Any = loaded.model.generate(
        torch.tensor([ids]), max_new_tokens=30, do_sample=False, repetition_penalty=1.0, eos_token_id=None
    )
    session.reset()
    text = "".join(session.generate(ids, max_tokens=30, ignore_eos=True))
    assert text == session.tokenizer.decode(generated[0, len(ids) :].tolist())


def test_verify_passes_over_six_wraps(bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run_cli("verify", bundle, "--against", smollm2_file(), "--wraps", 6, "--json", report).succeeded()
    assert json.loads(report.read_text())["passed"] is True


def test_streams_three_windows_from_another_folder_in_constant_memory(bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(bundle, moved)
    options = ("--ignore-eos", "--max-tokens", 4 * WINDOW, "--stats")
    # Nothing else may grow meanwhile: in a process of its own.
    done = run_cli_apart("run", moved, "--prompt", "Once upon a time", *options).succeeded()
    assert len(done.out.split()) > WINDOW  # words, not noise
    assert f"{4 * WINDOW} tokens" in done.err
    growth = re.search(r"\(([+-][0-9.]+) MiB since", done.err)
    assert growth is not None
    assert float(growth[1]) < 8.0  # the tokenizer's caches; the window's own 5 MB are there from the start


def test_chat_answers_each_line(bundle: Path) -> None:
    done = run_cli("run", bundle, "--chat", "--max-tokens", 12, stdin="Say hello.\n\nWhat is 2+2?\n").succeeded()
    assert len([line for line in done.out.split("\n") if line.strip()]) >= 2


def test_half_precision_bundle(tmp_path: Path) -> None:
    run_cli("export", smollm2_file(), "-o", tmp_path / "half", "--window", WINDOW, "--dtype", "fp16").succeeded()
    session = Session.load(tmp_path / "half")
    weights = session.manifest.files["weights.bin"].bytes
    assert 269.0e6 < weights < 269.5e6
    assert "Paris" in "".join(session.generate("The capital of France is", max_tokens=4, ignore_eos=True))


def test_cpp_runtime_says_the_same(bundle: Path, cpp_runtime: CppRuntime) -> None:
    """50 greedy tokens, past the window, and the tokenizer."""
    prompt = "Once upon a time, in a village at the edge of a great forest,"
    session = Session.load(bundle, verify=False)
    want = "".join(session.generate(prompt, max_tokens=50, ignore_eos=True))
    library = session.tokenizer
    session.close()
    done = cpp_runtime.run(
        cpp_runtime.generate, bundle, "--prompt", prompt, "--max-tokens", "50", "--ignore-eos", "--skip-hashes"
    )
    assert done.stdout == want + "\n", done.stderr
    # With memory for the program, but not for 538 MB of weights.
    limited = 'ulimit -v 400000; exec "$@"'
    done = cpp_runtime.run(
        Path("/bin/sh"),
        "-c",
        limited,
        "sh",
        cpp_runtime.generate,
        bundle,
        "--prompt",
        prompt,
        "--threads",
        "1",
        "--skip-hashes",
    )
    assert done.returncode == 2
    assert "decode.onnx: received too little memory" in done.stderr

    ours = Probe(cpp_runtime.programs / "libprobe.so").tokenizer(bundle / "tokenizer.json")
    for text in [*TEXTS, CHARACTERS, *(noise(seed) for seed in range(300))]:
        ids = library.encode(text)
        assert ours.encode(text, 1) == ids
        assert ours.decode(ids) == library.decode(ids)
        assert ours.encode(text, 2) == library.encode_next(text)
