"""What holds of every target: its passes exist, each has tests beside it, and graphs are what the target declares."""

from __future__ import annotations

from pathlib import Path

import pytest
import sinkexport.graph.passes
import sinkexport.targets
from sinkexport.config import ExportConfig, target_of
from sinkexport.frames import PASSES as FRAME_PASSES
from sinkexport.graph.graph_pass import GraphPass, PassContext, pass_class
from sinkexport.graph.quantize.forms import FORMS
from sinkexport.pipeline.export import export_loaded
from sinkexport.sources import LoadedModel
from sinkexport.targets import OPTIONS, TARGETS, Target, find_target
from sinkrt.contract import TARGETS as MANIFEST_NAMES

from tests.exporter.tiny_models import tiny_model

HERE = Path(__file__).parent / "passes"
NAMES = sorted({name for target in TARGETS for name in target.passes} | set(FRAME_PASSES))
EACH = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def files_of(package: object) -> set[str]:
    """Modules of a package, but for ``__init__``."""
    (folder,) = package.__path__
    return {path.stem for path in Path(folder).glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_has_its_name_and_a_test_file(name: str) -> None:
    found = pass_class(name)
    assert issubclass(found, GraphPass)
    assert found.__module__ == f"sinkexport.graph.passes.{name}"
    assert found.__doc__
    tests = HERE / f"test_{name}.py"
    assert tests.is_file(), f"{name} has no tests"
    assert found.__name__ in (text := tests.read_text())
    assert "check_left_alone(" in text, "graphs that do not fit, and a second run"


def test_no_pass_is_without_a_target() -> None:
    assert files_of(sinkexport.graph.passes) == set(NAMES)


def test_targets_are_registered_one_a_file() -> None:
    assert len(files_of(sinkexport.targets) - {"target"}) == len(TARGETS)
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    assert {find_target(target.option, native=target.native) for target in TARGETS} == set(TARGETS)
    assert find_target("onnx", native=True) is None
    assert {target.option for target in TARGETS} == set(OPTIONS)


@EACH
def test_what_a_target_declares_is_known(target: Target) -> None:
    assert target.manifest_name in MANIFEST_NAMES
    assert target.quantization in FORMS
    config = ExportConfig(target=target.option, native=target.native)
    assert target_of(config) is target
    assert config.has_plugins == target.has_plugins
    assert PassContext(target).target is target


@EACH
def test_graphs_are_of_the_form_that_the_target_declares(target: Target, tmp_path: Path) -> None:
    """build_graph refuses others; the manifest says the same."""
    geometry = {"num_sink_tokens": 2, "window_size": 6, "chunk_size": 1}
    config = ExportConfig(target=target.option, native=target.native, dtype="fp32", **geometry)
    model = tiny_model("llama", head_dim=64, num_hidden_layers=1)
    manifest = export_loaded(LoadedModel(model, None, "tiny"), tmp_path / "bundle", config, check=False)
    ids, position = manifest.graphs["decode"].inputs
    assert manifest.target == target.manifest_name
    assert ids.dtype == target.ids
    assert (len(position.shape), position.dtype) == {"int64": (1, "int64"), "int32 words": (2, "int32")}[
        target.position
    ]
    assert manifest.has_tensorrt_plugin == target.has_plugins
    assert (manifest.plugin_abi is not None) == (target.has_plugins or target.has_cpu_library)
