"""The plugin library: it compiles without a warning, exports what it should, and reports bad fields by their name."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from sinkrt.contract import PLUGIN_ABI

from tests.exporter.tensorrt.test_builder import needs_tensorrt
from tests.plugins.trt_library import needs_plugin_build

pytestmark = [needs_plugin_build, *needs_tensorrt, pytest.mark.slow]  # compiles for half a minute

# Creators are asked in a process of their own: what they print goes to the real stderr, and TensorRT keeps libraries.
ASK = """
import sys
import numpy as np
import tensorrt_rtx_bindings as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        pass

logger = Logger()
builder = trt.Builder(logger)
registry = builder.get_plugin_registry()
registry.load_library(sys.argv[1])
creator = next(c for c in registry.all_creators if c.name == sys.argv[2])
kinds = {"i": (np.int32, trt.PluginFieldType.INT32), "f": (np.float32, trt.PluginFieldType.FLOAT32),
         "l": (np.int64, trt.PluginFieldType.INT64)}
fields = []
for argument in sys.argv[3:]:
    name, kind, *values = argument.split(":")
    dtype, field_type = kinds[kind]
    fields.append(trt.PluginField(name, np.array([float(v) for v in values], dtype), field_type))
plugin = creator.create_plugin("x", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
print("none" if plugin is None else plugin.plugin_name if hasattr(plugin, "plugin_name") else "made")
"""

ATTENTION = {
    "scale": "f:0.125",
    "softcap": "f:0",
    "rope_scaling": "f:1",
    "packed_width": "i:0",
    "rotary_dim": "i:64",
    "interleaved": "i:0",
    "num_sinks": "i:4",
    "int8_window": "i:0",
    "has_num_valid": "i:1",
    "has_alibi": "i:1",
    "has_sink_logit": "i:1",
    "has_sink_scale": "i:1",
    "has_gate": "i:1",
}
LINEAR = {
    "num_outputs": "i:32",
    "has_bias": "i:0",
    "norm": "i:2",
    "norm_epsilon": "f:1e-6",
    "has_residual": "i:0",
    "gate": "i:3",
}
ROWS = {"row_length": "i:64"}
NORM = {"epsilon": "f:1e-6", "has_residual": "i:1", "float_weight": "i:0"}
GATE = {"activation": "i:2", "width": "i:64", "is_merged": "i:1"}
EXPERTS = {"num_outputs": "i:32"}
INT4 = {"block_size": "i:64", "has_zero_points": "i:1"}
GOOD = {
    "SinkAttention": ATTENTION,
    "Int8Linear": LINEAR,
    "Int4Linear": {**LINEAR, **INT4},
    "HalfLinear": LINEAR,
    "Int8ExpertLinear": EXPERTS,
    "Int4ExpertLinear": {**EXPERTS, **INT4},
    "HalfExpertLinear": EXPERTS,
    "Int8Rows": ROWS,
    "Int4Rows": {**ROWS, "num_rows": "i:9", **INT4},
    "RmsNorm": NORM,
    "GatedActivation": GATE,
}


def ask(plugin: Path, name: str, fields: dict[str, str], *more: str) -> tuple[str, str]:
    """What a creator answers, and what it prints."""
    arguments = [f"{key}:{value}" for key, value in fields.items()]
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(plugin), name, *arguments, *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_it_reports_its_abi_and_its_tensorrt(plugin_library: Path) -> None:
    library = ctypes.CDLL(str(plugin_library))
    library.sinkexport_plugin_abi.restype = ctypes.c_char_p
    assert library.sinkexport_plugin_abi().decode() == PLUGIN_ABI
    assert library.sinkexport_plugin_tensorrt_major() == 10


@pytest.mark.parametrize("name", GOOD)
def test_good_fields(plugin_library: Path, name: str) -> None:
    answer, printed = ask(plugin_library, name, GOOD[name])
    assert (answer == "none", printed) == (False, "")


@pytest.mark.parametrize(
    ("name", "changes", "more", "reported"),
    [
        ("SinkAttention", {"softcap": None}, (), "field 'softcap': missing"),
        ("SinkAttention", {}, ("colour:i:1",), "field 'colour': unknown, expected scale, softcap"),
        ("SinkAttention", {}, ("scale:f:1",), "field 'scale': received twice"),
        ("SinkAttention", {"scale": "i:1"}, (), "field 'scale': received another type, expected a float32"),
        ("SinkAttention", {"scale": "f:-1"}, (), "field 'scale': received -1"),
        ("SinkAttention", {"rotary_dim": "i:3"}, (), "field 'rotary_dim': received 3, expected an even number"),
        ("SinkAttention", {"num_sinks": "i:4:5"}, (), "field 'num_sinks': received 2 values, expected one"),
        ("SinkAttention", {"interleaved": "i:2"}, (), "field 'interleaved': received 2, expected 0 or 1"),
        ("SinkAttention", {"packed_width": "i:-64"}, (), "field 'packed_width': received -64, expected >= 0"),
        ("SinkAttention", {"has_gate": None}, (), "field 'has_gate': missing"),
        ("SinkAttention", {"has_alibi": "i:2"}, (), "field 'has_alibi': received 2, expected 0 or 1"),
        ("SinkAttention", {"has_sink_logit": "i:-1"}, (), "field 'has_sink_logit': received -1, expected 0 or 1"),
        ("SinkAttention", {"has_sink_scale": "i:3"}, (), "field 'has_sink_scale': received 3, expected 0 or 1"),
        ("Int8Linear", {"num_outputs": "l:4294967296"}, (), "field 'num_outputs': received 4294967296"),
        ("Int8Linear", {"num_outputs": "i:0"}, (), "field 'num_outputs': received 0, expected >= 1"),
        ("HalfLinear", {"has_bias": "i:2"}, (), "field 'has_bias': received 2, expected 0 or 1"),
        ("HalfLinear", {"has_residual": "i:2"}, (), "field 'has_residual': received 2, expected 0 or 1"),
        ("HalfLinear", {"norm": "i:3"}, (), "field 'norm': received 3, expected 0 (none), 1 (half) or 2 (float32)"),
        ("HalfLinear", {"norm_epsilon": "f:0"}, (), "field 'norm_epsilon': received 0.000000, expected > 0 with"),
        ("HalfLinear", {"norm": "i:0"}, (), "field 'norm_epsilon': received 0.000001, expected > 0 with a"),
        ("Int4Linear", {"gate": "i:4"}, (), "field 'gate': received 4, expected 0 (none), 1 (silu), 2 (gelu) or 3"),
        ("Int8ExpertLinear", {"num_outputs": "i:0"}, (), "field 'num_outputs': received 0, expected >= 1"),
        ("HalfExpertLinear", {}, ("has_bias:i:1",), "field 'has_bias': unknown, expected num_outputs"),
        ("Int4Linear", {"block_size": "i:16"}, (), "field 'block_size': received 16, expected 32, 64 or 128"),
        ("Int4Linear", {"has_zero_points": "i:2"}, (), "field 'has_zero_points': received 2, expected 0 or 1"),
        ("Int4ExpertLinear", {"block_size": None}, (), "field 'block_size': missing"),
        ("Int4Rows", {"num_rows": "i:0"}, (), "field 'num_rows': received 0, expected >= 1"),
        ("Int8Rows", {"row_length": "f:64"}, (), "field 'row_length': received another type, expected an int32"),
        ("RmsNorm", {"epsilon": "f:0"}, (), "field 'epsilon': received 0.000000, expected > 0"),
        ("RmsNorm", {"has_residual": "i:2"}, (), "field 'has_residual': received 2, expected 0 or 1"),
        ("RmsNorm", {"float_weight": "i:-1"}, (), "field 'float_weight': received -1, expected 0 or 1"),
        ("GatedActivation", {"activation": "i:3"}, (), "field 'activation': received 3, expected 0 (silu), 1"),
        ("GatedActivation", {"width": "i:0"}, (), "field 'width': received 0, expected >= 1"),
        ("GatedActivation", {"is_merged": "i:3"}, (), "field 'is_merged': received 3, expected 0 or 1"),
    ],
)
def test_bad_fields(plugin_library: Path, name: str, changes: dict, more: tuple[str, ...], reported: str) -> None:
    fields = {key: value for key, value in {**GOOD[name], **changes}.items() if value is not None}
    answer, printed = ask(plugin_library, name, fields, *more)
    assert answer == "none"
    assert printed.startswith(f"{name} plugin: {reported}")
    assert "\n" not in printed
