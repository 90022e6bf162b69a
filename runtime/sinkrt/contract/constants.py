"""Versions, names, sets and limits of the contract. The C++ runtime's are generated from here: `make generated`."""

from __future__ import annotations

from collections.abc import Mapping

SCHEMA_VERSION = 7
"""Version of the manifest. Older ones are read as well. What each brought: 2: `quantization` and the scales of an INT8
window. 3: `plugin_abi` and `engines`. 4: `sink_tuning` and `head_windows`. 5: `affine_attention`, and `act` in
`sink_tuning`, with the state ``attention_mass``. 6: `weight_bytes` of a graph. 7: `attention`, caches
of several calls a layer, latent caches, any number of recurrent states in a layer, and models without attention."""

ATTENTION_SCHEMA = 7
"""Version that brought `attention`: older manifests have none."""

LAYOUT_METADATA = "sinkexport.layout"
"""Key of a graph's metadata: the sizes that it was made for, in bundles whose manifest has `attention`.

Some show in no input of the graph: query heads, how much of a latent row is the value, W of a model without attention.
"""

MANIFEST_NAME = "manifest.json"

ENGINE_FOLDER = "engines"
PLUGIN_FILE = f"{ENGINE_FOLDER}/libsinkexport_plugin.so"
"""Where 'sinkexport build' puts the plugin, and sessions look for it."""

VERIFY = "verify"
"""Role of the graph that computes the logits of drafted tokens, and writes no state."""

ROWS_SUFFIX = ".rows"
"""What follows the name of a state in the name of its new rows, an output of the graph that verifies."""

STATE_FORMAT = "sinkrt-state"
STREAM_FORMAT = "sinkrt-stream"
STATE_VERSION = "2"
"""Version of the files of states and of single streams."""

PLUGIN_ABI = "5"
"""Version of the TensorRT plugins' names, inputs, outputs and fields, as the graphs of this version have them."""

CPU_ABI = "4"
"""Version of the CPU library's operators and of its layout of weights, as the graphs of this version have them."""

OPERATOR_DOMAIN = "ai.sinkexport"
"""Domain of the operators that TensorRT's plugins and the CPU library implement."""

CPU_LIBRARY = "libsinkexport_cpu.so"
"""The CPU library, which is found beside the package."""

CPU_LIBRARY_VARIABLE = "SINKEXPORT_CPU_LIBRARY"
"""Environment variable with the path of another one."""

CPU_ISA_VARIABLE = "SINKEXPORT_CPU_ISA"
"""Environment variable with the name of the instruction set whose kernels it uses."""

THREADS_OPTION = "sinkexport.threads"
"""Entry of a session's configuration by which the CPU library is given the number of threads."""

NO_TOKEN = -1
"""Id of a stream that stands still while others step, in models with recurrent states: these know no positions."""

CPU = "cpu"
TENSORRT_TARGET = "tensorrt"
TARGETS = ("onnx", CPU, TENSORRT_TARGET)
FLOAT_DTYPES = ("float32", "float16")
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "int8": 1}
SAFETENSORS_DTYPES: Mapping[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
}
"""Names of the dtypes in state files."""

WEIGHT_KINDS = ("float", "int8", "int4")
ACTIVATION_KINDS = ("float", "dynamic", "static")
WINDOW_KINDS = ("fp", "int8")
TENSORRT, TENSORRT_RTX = "TensorRT", "TensorRT-RTX"
FLAVOURS = (TENSORRT, TENSORRT_RTX)

STATE_KINDS = ("sink_k", "sink_v", "window_k", "window_v")
SCALE_KINDS = ("window_k_scale", "window_v_scale")
"""States that an INT8 window has besides: what its entries are to be multiplied by."""

MASS_KIND = "attention_mass"
"""State of a layer whose later sinks are calibrated: the attention that each token in the window has received."""

RECURRENT_KINDS = ("conv", "recurrent")
"""States of a recurrence: linear attention, a state-space layer, a short convolution. They carry all earlier tokens."""

ALL_KINDS = (*STATE_KINDS, *SCALE_KINDS, MASS_KIND, *RECURRENT_KINDS)

MAX_RANK = 8
"""Axes of a tensor; NumPy and ONNX Runtime end at 64 and at 8 or so."""

MAX_TENSOR_BYTES = 2**46
"""More than any address space of a process holds."""
