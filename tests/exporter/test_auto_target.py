"""``--target auto``, the default: what it takes, what it says, and what machines without the CPU library say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sinkexport
from sinkexport.config import ExportConfig
from sinkexport.quant.recipe import load_recipe
from sinkrt import Session
from sinkrt.contract import load_manifest
from sinkrt.contract.constants import CPU_LIBRARY_VARIABLE
from sinkrt.errors import BackendError, UsageError

from tests.exporter.tiny_models import tiny_model
from tests.support import Result, export_model, random_ids, refused, run_cli

pytestmark = pytest.mark.usefixtures("cpu_library")
GEOMETRY = ("--window", 9, "--sink-tokens", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(tmp_path / "nothing.so"))


def exported(model: Path, out: Path, *options: object) -> Result:
    return run_cli("export", model, "-o", out, *GEOMETRY, *options).succeeded()


def last_line(result: Result) -> str:
    return result.out.splitlines()[-1]


# --- what it takes and says ------------------------------------------------------------------------------------------


def test_the_library_where_it_runs(model: Path, tmp_path: Path) -> None:
    done = exported(model, tmp_path / "bundle")
    assert last_line(done) == "target cpu: the CPU library runs here; bundles for any machine: --target onnx"
    assert load_manifest(tmp_path / "bundle").target == "cpu"
    run_cli("verify", tmp_path / "bundle", "--against", model).succeeded()


@pytest.mark.usefixtures("no_library")
def test_standard_operators_elsewhere(model: Path, tmp_path: Path) -> None:
    done = exported(model, tmp_path / "bundle")
    assert last_line(done) == "target onnx: the CPU library does not run here, see 'sinkexport inspect cpu'"
    assert load_manifest(tmp_path / "bundle").target == "onnx"


def test_what_the_library_has_no_kernels_for(model: Path, tmp_path: Path) -> None:
    done = exported(model, tmp_path / "bundle", "--dtype", "fp16")
    assert last_line(done) == "target onnx: the CPU library has no kernels for --dtype fp16"
    assert load_manifest(tmp_path / "bundle").target == "onnx"
    done = run_cli("export", model, "-o", tmp_path / "half", *GEOMETRY, "--target", "cpu", "--dtype", "fp16")
    done.refusal("dtype: received fp16 with target cpu, expected fp32", "use --target onnx")


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_a_named_target_needs_no_word(target: str, model: Path, tmp_path: Path) -> None:
    done = exported(model, tmp_path / "bundle", "--target", target)
    assert done.out.count("\n") == 1
    assert load_manifest(tmp_path / "bundle").target == target


def test_native_needs_its_target() -> None:
    run_cli("export", "nowhere", "-o", "x", "--native").refusal("native: received target auto, expected target tensor")


def test_a_target_that_there_is_not() -> None:
    with refused("target: received 'gpu', expected onnx | cpu | tensorrt | auto; change --target", error=UsageError):
        ExportConfig(target="gpu")


# --- Python ----------------------------------------------------------------------------------------------------------


def test_python_has_the_same_default(
    model: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = {"num_sink_tokens": 2, "window_size": 9}
    manifest = sinkexport.export(str(model), tmp_path / "bundle", sinkexport.ExportConfig(**geometry))
    assert manifest.target == "cpu"
    assert ExportConfig(recipe=load_recipe("int8-weights"), kv="int8").target == "cpu"
    assert ExportConfig(dtype="fp16").target == "onnx"
    request.getfixturevalue("no_library")
    assert ExportConfig().target == "onnx"
    assert sinkexport.export(str(model), tmp_path / "plain", ExportConfig(**geometry)).target == "onnx"


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_chunks_of_256_for_the_library(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    sizes = [ExportConfig(target=target).num_tokens_per_chunk for target in ("cpu", "onnx", "tensorrt")]
    assert sizes == [256, 64, 256]
    assert ExportConfig().num_tokens_per_chunk == 256
    assert ExportConfig(window_size=100).num_tokens_per_chunk == 100
    assert ExportConfig(chunk_size=32).num_tokens_per_chunk == 32
    request.getfixturevalue("no_library")
    assert ExportConfig().num_tokens_per_chunk == 64


@pytest.mark.parametrize(("family", "chunk"), [("llama", 80), ("gptj", 64)])
def test_chunks_of_models_that_the_library_does_not_do_whole(family: str, chunk: int, tmp_path: Path) -> None:
    """GPT-J's rotation keeps its attention in standard operators, which compute rows of a chunk without a token too."""
    bundle = export_model(family, tmp_path / "bundle", num_sink_tokens=2, window_size=80, target="cpu", check=False)
    assert bundle.manifest.stream.chunk_size == chunk
    asked = export_model(family, tmp_path / "asked", window_size=80, chunk_size=70, target="cpu", check=False)
    assert asked.manifest.stream.chunk_size == 70


def test_parts_of_a_chunk_are_what_steps_are(tmp_path: Path) -> None:
    session = export_model("llama", tmp_path / "bundle", num_sink_tokens=2, window_size=14, target="cpu").session()
    assert session.smallest_chunk == 2
    for count in (2, 3, 13, 14, 15, 40):
        ids = random_ids(1, count, seed=count)
        session.reset()
        stepped = [session.step(column)[0].copy() for column in ids.T][-1]
        session.reset()
        np.testing.assert_allclose(session.prefill(ids)[0], stepped, atol=1e-4)


# --- elsewhere -------------------------------------------------------------------------------------------------------


def test_a_bundle_on_a_machine_without(model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    exported(model, tmp_path / "bundle")
    request.getfixturevalue("no_library")
    fixes = ("CPU library: received", "install sinkexport where there is a C++ compiler", "export with --target onnx")
    with refused(*fixes, error=BackendError):
        Session.load(tmp_path / "bundle")
    run_cli("run", tmp_path / "bundle", "--prompt", "a").refusal(*fixes)
