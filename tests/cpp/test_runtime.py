"""The C++ runtime against the Python one: the same tokens, the same state files, the same refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sinkrt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sinkexport.config import ExportConfig
from sinkexport.quant.recipe import load_recipe
from sinkrt import Session, UsageError
from sinkrt.contract import MANIFEST_NAME, load_manifest
from sinkrt.sampler import Sampler, SamplingParams

from tests.cpp import manifests
from tests.cpp.build import CppRuntime, onnxruntime_library
from tests.cpp.probe import Probe, ProbeError
from tests.cpp.tokenizer_kinds import DECODERS, LLAMA_DECODER, metaspace, model, sequence, whole
from tests.exporter.pipeline.test_families import exported
from tests.exporter.tiny_models import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.exporter.variants.test_head_windows import window_file
from tests.exporter.variants.test_later_sinks import tuning
from tests.runtime.toy import Toy, build_toy, rehash
from tests.support import export_model

SINKS, WINDOW = 4, 12
WRAPS = SINKS + 4 * WINDOW  # tokens; the prompt comes before
SAMPLING: dict[str, Any] = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "repetition_penalty": 1.15,
    "seed": 2**64 - 3,
}


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]


def python_ids(session: Session, prompt: list[int], count: int, **options: Any) -> list[int]:
    """Ids that the Python runtime samples and feeds after `prompt`."""
    sampler = Sampler(SamplingParams(**options), session.manifest.model.vocab_size)
    if prompt:
        session.prefill(prompt)
    out = []
    for _ in range(count):
        recent = session.recent_ids()
        out.append(sampler.sample(session.logits[0], recent, int(session.position[0])))
        session.step([out[-1]])
    return out


def cpp_ids(cpp: CppRuntime, bundle: Path, prompt: list[int], count: int, *more: str | Path) -> list[int]:
    done = cpp.run(
        cpp.generate,
        bundle,
        "--ids",
        "-",
        "--max-tokens",
        str(count),
        "--ignore-eos",
        "--threads",
        "1",
        *more,
        input=" ".join(map(str, prompt)),
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.fixture(scope="module", params=["llama", "int8-window", "head-windows", "act", "qwen3_5_text", "cpu"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with a prefill graph: a Llama, its window in floating point, INT8, or of two lengths, its later sinks
    calibrated, or not; linear attention; for the CPU library, INT8 weights and window."""
    name = request.param if request.param == "qwen3_5_text" else "llama"
    is_for_cpu = request.param == "cpu"
    if is_for_cpu:
        request.getfixturevalue("cpu_library")
    windows = window_file("llama", ((WINDOW, 5), (5, WINDOW))) if request.param == "head-windows" else None
    config = ExportConfig(
        num_sink_tokens=SINKS,
        window_size=WINDOW,
        chunk_size=5,
        kv="int8" if request.param in ("int8-window", "cpu") else "fp",
        recipe=load_recipe("int8-weights") if is_for_cpu else None,
        target="cpu" if is_for_cpu else "onnx",
        budgets=windows,
        sink_tuning=tuning("llama") if request.param == "act" else None,
    )
    folder = tmp_path_factory.mktemp("cpp") / "bundle"
    exported(tiny_model(name), folder, config).close()
    return folder


@pytest.mark.parametrize("length", [1, SINKS + WINDOW + 1, 77])
def test_same_tokens_over_wraps(cpp_runtime: CppRuntime, bundle: Path, length: int) -> None:
    prompt = np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist()
    for options in ({}, SAMPLING):
        with Session.load(bundle, threads=1) as session:
            want = python_ids(session, prompt, WRAPS, **options)
        assert cpp_ids(cpp_runtime, bundle, prompt, WRAPS, *flags(options)) == want


def test_states_go_both_ways(cpp_runtime: CppRuntime, bundle: Path, tmp_path: Path) -> None:
    prompt = np.random.default_rng(5).integers(0, VOCAB_SIZE, 23).tolist()
    with Session.load(bundle, threads=1) as session:
        first = python_ids(session, prompt, 10)
        session.save_state(tmp_path / "python")
        second = python_ids(session, [], WRAPS)
        got = cpp_ids(cpp_runtime, bundle, prompt, 10, "--save-state", tmp_path / "cpp")
        assert got == first
        # The same bits in the same layout: header, names, offsets and all.
        assert (tmp_path / "cpp").read_bytes() == (tmp_path / "python").read_bytes()
        session.load_state(tmp_path / "cpp")
        assert python_ids(session, [], WRAPS) == second
    done = cpp_runtime.run(
        cpp_runtime.generate,
        bundle,
        "--load-state",
        tmp_path / "python",
        "--ignore-eos",
        "--threads",
        "1",
        "--max-tokens",
        str(WRAPS),
    )
    assert [int(word) for word in done.stdout.split()] == second
    assert {path.name for path in tmp_path.iterdir()} == {"cpp", "python"}  # nothing left lying about


@pytest.mark.parametrize("name", ["toy", "qwen3_5_text"])
def test_batch_of_streams_in_several_tokens_at_once(name: str, probe: Probe, tmp_path: Path) -> None:
    """Three streams with prompts of their own; one of them ends its text and stands still while the others go on."""
    if name == "toy":
        bundle = build_toy(tmp_path / "toy", Toy(batch=3, chunk_size=4, num_sink_tokens=2, window_size=7, seed=3))
    else:  # linear attention, whose states stand still only where a mask says so
        bundle = tmp_path / "bundle"
        exported(tiny_model(name), bundle, ExportConfig(2, 7, batch=3, chunk_size=4)).close()
    prompt = np.random.default_rng(1).integers(0, VOCAB_SIZE, (3, 21))
    count = 40
    with Session.load(bundle, threads=1) as session:
        session.prefill(prompt)
        want: list[list[int]] = [[], [], []]
        for _ in range(count):
            ids = session.logits.argmax(axis=1)
            for row, token in zip(want, ids.tolist(), strict=True):
                row.append(token)
            session.step(ids)
        assert probe.steps(bundle, prompt, count, tmp_path / "all", ignore_eos=True) == want
        session.save_state(tmp_path / "wanted")
        assert (tmp_path / "all").read_bytes() == (tmp_path / "wanted").read_bytes()

        # What stream 1 picks third ends its text, from here on.
        raw = json.loads((bundle / MANIFEST_NAME).read_text())
        raw["model"]["eos_token_ids"] = [want[1][2]]
        (bundle / MANIFEST_NAME).write_text(json.dumps(raw))
        ends = [row.index(want[1][2]) if want[1][2] in row else count for row in want]
        assert ends[1] <= 2
        assert probe.steps(bundle, prompt, count, tmp_path / "some", ignore_eos=False) == [
            row[:end] for row, end in zip(want, ends, strict=True)
        ]
    with Session.load(bundle, threads=1) as session:  # the manifest's fingerprint is another now
        session.prefill(prompt)
        for i in range(count):
            active = [b for b in range(3) if i < ends[b]]
            if active:
                session.step([want[b][i] for b in active], streams=active)
        session.save_state(tmp_path / "wanted")
        assert (tmp_path / "some").read_bytes() == (tmp_path / "wanted").read_bytes()


def test_text_and_tokens_at_once(cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "toy", Toy(chunk_size=4))
    with Session.load(bundle, threads=1) as session:
        want = "".join(session.generate("naïve — 日本 🚀", max_tokens=60, ignore_eos=True, **SAMPLING))
        session.save_state(tmp_path / "python")
        more = "".join(session.generate(None, max_tokens=30, ignore_eos=True, **SAMPLING))
    run = [cpp_runtime.generate, bundle, "--ignore-eos", "--threads", "1", *flags(SAMPLING)]
    done = cpp_runtime.run(
        *run,
        "--prompt",
        "naïve — 日本 🚀",
        "--max-tokens",
        "60",
        "--tokens-at-once",
        "7",
        "--save-state",
        tmp_path / "cpp",
        "--stats",
    )
    assert done.stdout == want + "\n"
    assert re.search(r"60 tokens, position \d+, memory growth -?\d+ bytes", done.stderr)
    assert (tmp_path / "cpp").read_bytes() == (tmp_path / "python").read_bytes()
    done = cpp_runtime.run(*run, "--load-state", tmp_path / "cpp", "--max-tokens", "30")
    assert done.stdout == more + "\n"


def test_ten_thousand_tokens_without_an_allocation(cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    chains = [LLAMA_DECODER, metaspace(), *(sequence("decoders", *DECODERS[i:], *DECODERS[:i]) for i in range(9))]
    files = [tmp_path / f"{i}.json" for i in range(len(chains))]
    for file, chain in zip(files, chains, strict=True):
        file.write_text(json.dumps(whole(model("bpe"), decoder=chain)), encoding="utf-8")
    for toy in (Toy(chunk_size=4), Toy(batch=2)):
        bundle = build_toy(tmp_path / f"batch{toy.batch}", toy)
        done = cpp_runtime.run(cpp_runtime.programs / "allocations", bundle, "10000", *files)
        assert re.fullmatch(r"ours 0 onnxruntime [1-9]\d* kernels 0 of 0 buffers same\n", done.stdout), (
            done.stdout + done.stderr
        )


def test_ten_thousand_tokens_by_the_cpu_library(cpp_runtime: CppRuntime, cpu_library: Path, tmp_path: Path) -> None:
    for batch in (1, 2):
        config = ExportConfig(
            SINKS, WINDOW, batch=batch, chunk_size=5, target="cpu", recipe=load_recipe("int4-nearest")
        )
        bundle = tmp_path / f"batch{batch}"
        export_model("llama", bundle, config, tokenizer=tiny_tokenizer())
        with_decoder = json.dumps(whole(model("bpe"), decoder=LLAMA_DECODER))
        (bundle / "tokenizer.json").write_text(with_decoder, encoding="utf-8")
        rehash(bundle)
        done = cpp_runtime.run(cpp_runtime.programs / "allocations", bundle, "10000")
        # The kernels' scratch memory has its size after the first run of each graph.
        assert re.fullmatch(r"ours 0 onnxruntime [1-9]\d* kernels 0 of [1-9]\d* buffers same\n", done.stdout), (
            done.stdout + done.stderr
        )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 17, 300, 3000]),
    st.sampled_from([0.0, 0.3, 1.0, 3.0, 1e-40]),
    st.sampled_from([0, 1, 5, 100, 5000]),
    st.sampled_from([1e-3, 0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.8, 1.0, 1.3]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**47),
)
def test_sampler_picks_what_pythons_picks(
    probe: Probe,
    draw: int,
    size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    seed: int,
    position: int,
) -> None:
    random = np.random.default_rng(draw)
    logits = (random.standard_normal(size) * 4).astype(np.float32)
    if draw % 3 == 0:
        logits = np.round(logits)  # many ties
    recent = random.integers(-1, size, 20)
    params = SamplingParams(temperature, top_k, top_p, penalty, seed)
    want = Sampler(params, size).sample(logits, recent, position)
    assert probe.sample(logits, recent, position, *dataclasses.astuple(params)) == want


def test_sampler_refuses_what_are_no_numbers(probe: Probe) -> None:
    recent = np.zeros(0, dtype=np.int64)
    for bad in (np.nan, np.inf):
        logits = np.array([0.0, bad, 1.0], dtype=np.float32)
        with pytest.raises(ProbeError, match=r"logits: received (nan|inf), expected finite numbers"):
            probe.sample(logits, recent, 0, 0.0, 0, 1.0, 1.0, 0)
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    good = (1.0, 0, 1.0, 1.0)
    bad_values = (
        (-1.0, 100.1, 1e300, np.nan, np.inf),
        (-1, 2**31),
        (0.0, 1.1, np.nan),
        (0.0, -1.0, 1e-300, 1e-60, 0.009, 100.1, 1e300, np.nan),
    )
    for i, values in enumerate(bad_values):
        for value in values:
            options = (*good[:i], value, *good[i + 1 :])
            with pytest.raises(ProbeError, match=names[i]) as cpp:
                probe.sample(np.zeros(3, dtype=np.float32), recent, 0, *options, 0)
            with pytest.raises(UsageError, match=names[i]) as python:  # the limits, and the words for them, are one
                SamplingParams(*options)
            assert str(cpp.value).partition(", expected ")[2] == str(python.value).partition(", expected ")[2]
    edge = np.array([3.0, -2.0, 1.0], dtype=np.float32)
    for options in ((100.0, 2**31 - 1, 5e-324, 100.0), (5e-324, 0, 1.0, 0.01)):
        want = Sampler(SamplingParams(*options, 3), 3).sample(edge, np.array([0, 1]), 7)
        assert probe.sample(edge, np.array([0, 1]), 7, *options, 3) == want


def test_manifests_are_read_as_python_reads_them(probe: Probe, tmp_path: Path) -> None:
    good = build_toy(tmp_path / "toy", Toy(chunk_size=4))
    probe.check(good)
    assert probe.fingerprint(good) == load_manifest(good).fingerprint
    raw = json.loads((good / MANIFEST_NAME).read_text())
    raw["model"].update(name='ü "quoted"\n\x7f 🚀', bos_token_id=None, eos_token_ids=[])
    (good / MANIFEST_NAME).write_text(json.dumps(raw))
    assert probe.fingerprint(good) == load_manifest(good).fingerprint
    for text in manifests.good_manifests(raw):
        (good / MANIFEST_NAME).write_text(text)
        assert probe.fingerprint(good) == load_manifest(good).fingerprint
        assert probe.manifest(good) == load_manifest(good).to_json()
    for faults in (
        manifests.broken_streams,
        manifests.broken_states,
        manifests.broken_graphs,
        manifests.broken_options,
    ):
        for text in faults(raw):
            (good / MANIFEST_NAME).write_text(text)
            check_both_refuse(probe, good)
    for text, message in manifests.reported_faults(raw):
        (good / MANIFEST_NAME).write_text(text)
        with pytest.raises(ProbeError, match=message):
            probe.check(good)


def check_both_refuse(probe: Probe, bundle: Path) -> None:
    """The same thing is refused, in the same words: 'what' comes before 'received'."""
    with pytest.raises(sinkrt.BundleError) as python:
        load_manifest(bundle)
    with pytest.raises(ProbeError) as cpp:
        probe.fingerprint(bundle)
    if "JSON" not in str(python.value):
        assert str(cpp.value).partition(": received")[0] == str(python.value).partition(": received")[0]
    assert "\n" not in str(cpp.value)


def broken_bundles(folder: Path) -> dict[str, tuple[Path, int, str]]:
    """Bundles with one fault each: their folder, the C interface's status and part of its message."""
    good = build_toy(folder / "good", Toy(chunk_size=4))
    out: dict[str, tuple[Path, int, str]] = {}

    def broken(name: str, status: int, message: str) -> Path:
        out[name] = (Path(shutil.copytree(good, folder / name)), status, message)
        return out[name][0]

    (broken("no manifest", 2, "manifest.json: received no readable file") / MANIFEST_NAME).unlink()
    (broken("no graph", 2, "decode.onnx: received no such file") / "decode.onnx").unlink()
    os.truncate(broken("weights cut short", 2, "weights.bin: received 100 bytes") / "weights.bin", 100)
    bad = broken("other weights", 2, "weights.bin: received sha256") / "weights.bin"
    bad.write_bytes(bytes(bad.stat().st_size))
    # Damage that the manifest itself vouches for, so that ONNX Runtime meets it.
    for name, file, size in (
        ("graph cut short", "decode.onnx", 500),
        ("prefill cut short", "prefill.onnx", 900),
        ("weights too short", "weights.bin", 100),
    ):
        bad = broken(name, 2, "a graph that ONNX Runtime refuses")
        os.truncate(bad / file, size)
        rehash(bad)
    bad = broken("empty graph", 2, "decode.onnx: received a graph that ONNX Runtime refuses")
    (bad / "decode.onnx").write_bytes(b"")
    rehash(bad)
    for name, old, new, status, message in (
        ("other shape", '"window_size": 6', '"window_size": 7', 2, ""),
        ("too large", "   6,\n", f"   {2**40},\n", 5, "memory: received"),
    ):
        manifest = broken(name, status, message) / MANIFEST_NAME
        text = manifest.read_text()
        assert old in text
        manifest.write_text(text.replace(old, new))
    for name, old, new in (
        ("other shape", "   6,\n", "   7,\n"),  # of the states
        ("too large", '"window_size": 6', f'"window_size": {2**40}'),
    ):
        manifest = out[name][0] / MANIFEST_NAME
        manifest.write_text(manifest.read_text().replace(old, new))
    out["other shape"] = (out["other shape"][0], 2, "graph and manifest differ: export again")
    return out


def check_c_interface(cpp: CppRuntime, folder: Path) -> None:
    """The C program on a good bundle and all the broken ones, in one process."""
    faults = broken_bundles(folder)
    good = folder / "good"
    done = cpp.run(cpp.programs / "c_api", good, folder, *(path for path, *_ in faults.values()))
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, ids = done.stdout.rstrip("\n").split("\n")
    for line, (name, (_, status, message)) in zip(lines, faults.items(), strict=True):
        assert line.startswith(f"{status} "), (name, line)
        assert message in line, (name, line)
    with Session.load(good, threads=1) as session:
        session.prefill(list(b"Hello, world"))
        session.step([ord("H")])
        assert python_ids(session, [], 20) == [int(word) for word in ids.split()]


def test_c_interface_and_faults(cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    check_c_interface(cpp_runtime, tmp_path)


def test_refusals_of_the_example(cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "toy", tokenizer=False)
    state = tmp_path / "state"
    with Session.load(build_toy(tmp_path / "other", Toy(seed=1)), threads=1) as other:
        other.prefill([1, 2, 3])
        other.save_state(state)
    for arguments, message in (
        ((), "BUNDLE: received nothing"),
        ((bundle, "--odd"), "argument: received '--odd'"),
        ((bundle, "--seed"), "--seed: received nothing"),
        ((bundle, "--seed", "-1"), "--seed: received -1"),
        ((bundle, "--top-p", "x"), "--top-p: received x, expected a number"),
        ((bundle, "--max-tokens", "0"), "--max-tokens: received 0, expected >= 1"),
        ((bundle, "--threads", "-1"), "--threads: received -1, expected 0 .. 4096"),
        ((bundle, "--device", "4294967295"), "--device: received 4294967295, expected 0 .. 4096"),
        ((bundle, "--backend", "odd"), "backend: received 'odd', expected ort | tensorrt"),
        ((bundle, "--backend", "tensorrt"), "backend: received 'tensorrt', which this library was built without"),
        ((bundle, "--onnxruntime", "/nowhere.so"), "ONNX Runtime: received no library that loads"),
        ((bundle, "--onnxruntime", cpp_runtime.install / "lib/libsinkrt.so"), "a library without OrtGetApiBase"),
        ((bundle,), "prompt: received none, expected some text"),
        ((bundle, "--load-state", state), "fingerprint: received"),
        ((bundle, "--ids", "/nowhere"), "--ids: received '/nowhere', without any"),
        ((tmp_path, "--prompt", "x"), "manifest.json: received no readable file"),
    ):
        done = cpp_runtime.run(cpp_runtime.generate, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    with Path("/dev/full").open("w") as full:  # what cannot be written is no success
        arguments = [
            str(cpp_runtime.generate),
            str(bundle),
            "--ids",
            "-",
            "--max-tokens",
            "3",
            "--ignore-eos",
            "--onnxruntime",
            str(onnxruntime_library()),
        ]
        done = subprocess.run(arguments, input="1 2 3", stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.partition(",")[0]) == (
        2,
        "error: standard output: received an error while writing",
    )
    assert "--temperature" in cpp_runtime.run(cpp_runtime.generate, "--help").stdout


def test_program_of_the_documentation(cpp_runtime: CppRuntime, tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "toy")
    done = cpp_runtime.run(cpp_runtime.programs / "snippet", bundle, input="hello\nagain\n")
    assert done.returncode == 0
    assert done.stdout.count("\n") >= 2  # an answer to each line, of random weights: any length
    assert "manifest.json" in cpp_runtime.run(cpp_runtime.programs / "snippet", tmp_path).stderr
