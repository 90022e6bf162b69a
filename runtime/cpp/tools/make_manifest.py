#!/usr/bin/env python3
"""Generate what the C++ runtime shares with ``sinkrt.contract``: constants, structs, their readers, sampling options.

    python make_manifest.py           write the files
    python make_manifest.py --check   exit with 1 if a file differs from what would be written

The files are `OUTPUTS`; a region of the C interface's header is rewritten in place. Needs clang-format beside this
Python, or on the path.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

CPP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CPP.parent))

from cpp_sampling import c_interface, c_options, options_header, sampling_header  # noqa: E402
from cpp_text import NOTICE, formatted, quoted  # noqa: E402
from sinkrt.contract import constants, schema  # noqa: E402
from sinkrt.contract.manifest import Manifest  # noqa: E402
from sinkrt.contract.rules import CROSS_CHECK, label_of, rule_of  # noqa: E402
from sinkrt.ring import POSITION_LIMIT  # noqa: E402

PARTS: tuple[type, ...] = tuple(
    value
    for value in vars(schema).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == schema.__name__
)
CLASSES = (*PARTS, Manifest)

METHODS: Mapping[type, str] = {
    schema.TensorSpec: "int64_t bytes() const { return tensorBytes(shape, dtype); }",
    schema.StateSpec: """
  TensorSpec tensor() const { return {input, shape, dtype}; }
  int64_t bytes() const { return tensorBytes(shape, dtype); }
  int64_t rowBytes() const { return bytes() / shape[0]; }  // of one stream
  // Whether it belongs to a recurrence: a step makes all of it anew, by standard operators.
  bool isRecurrent() const;""",
    schema.AttentionCache: """
  // What its states have behind "<kind>.": the layer, and the call unless it is the first.
  std::string suffix() const { return std::to_string(layer) + (call == 0 ? "" : ".call" + std::to_string(call)); }""",
    schema.StreamFacts: "int64_t capacity() const { return num_sink_tokens + window_size; }  // C",
    Manifest: """
  // Whether there are recurrent states: these know no positions, so an idle stream takes kNoToken.
  bool isRecurrent() const;
  int64_t weightsBytes() const;
  int64_t stateBytes() const;
  // What the metadata of each graph must say; "nothing" where they need not have it.
  std::string graphLayout() const;
  // What a saved state depends on: the same digits as Python's `Manifest.fingerprint`.
  std::string fingerprint() const;
  // The text of manifest.json, byte for byte as Python's `Manifest.to_json` writes it.
  std::string toJson() const;

  // Parse and validate. Throws Error(kBundle) for malformed text, an unknown or missing key, or a newer schema.
  static Manifest fromJson(const std::string& text);""",
}
"""Methods of the structs, which the contract's classes have by hand as well."""

MANIFEST_FUNCTIONS = """
// Read bundle/manifest.json. Throws Error(kBundle).
Manifest loadManifest(const std::string& bundle);

// Size and SHA-256 of a file. Throws Error(kBundle) if it cannot be read.
FileFacts hashFile(const std::string& path);

// Compare every file of the bundle with the manifest: size always, SHA-256 if `hashes`. Throws Error(kBundle).
void checkFiles(const std::string& bundle, const Manifest& manifest, bool hashes = true);
"""


def main(arguments: list[str]) -> int:
    """Write the files, or compare them; returns the exit code."""
    check = arguments == ["--check"]
    if arguments and not check:
        print(__doc__, file=sys.stderr)
        return 2
    stale = []
    for name, make in OUTPUTS.items():
        path = CPP / name
        text = formatted(make(), path)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"runtime/cpp/{name}: {'differs from sinkrt.contract: run make generated' if check else 'written'}")
    return int(check and bool(stale))


# --- constants -------------------------------------------------------------------------------------------------------


def constants_header() -> str:
    """Return include/sinkrt/constants.h, which device code includes too."""
    return f"""{NOTICE}// Versions, names and limits.
#pragma once

#include <cstdint>

namespace sinkrt {{

constexpr int64_t kSchemaVersion = {constants.SCHEMA_VERSION};
// Version that brought `attention`.
constexpr int64_t kAttentionSchema = {constants.ATTENTION_SCHEMA};
// Key of a graph's metadata: the sizes that it was made for, where a manifest has `attention`.
constexpr const char* kLayoutMetadata = {quoted(constants.LAYOUT_METADATA)};
constexpr const char* kManifestName = {quoted(constants.MANIFEST_NAME)};
// ABI of the TensorRT plugins that the graphs of this version have nodes of.
constexpr const char* kPluginAbi = {quoted(constants.PLUGIN_ABI)};
// Target of bundles for TensorRT.
constexpr const char* kTensorrtTarget = {quoted(constants.TENSORRT_TARGET)};
// Target of bundles for the CPU library, ABI of its operators, its file, the environment variable with the path of
// another one, and the entry of a session's configuration by which it is given the number of threads.
constexpr const char* kVerifyRole = {quoted(constants.VERIFY)};
constexpr const char* kCpuTarget = {quoted(constants.CPU)};
constexpr const char* kCpuAbi = {quoted(constants.CPU_ABI)};
constexpr const char* kCpuLibrary = {quoted(constants.CPU_LIBRARY)};
constexpr const char* kCpuLibraryVariable = {quoted(constants.CPU_LIBRARY_VARIABLE)};
constexpr const char* kThreadsOption = {quoted(constants.THREADS_OPTION)};
// Domain of the operators of the TensorRT plugins and the CPU library.
constexpr const char* kOperatorDomain = {quoted(constants.OPERATOR_DOMAIN)};
// Where 'sinkexport build' and sinkrt_build put engines and the plugin, and sessions look for them.
constexpr const char* kEngineFolder = {quoted(constants.ENGINE_FOLDER)};
constexpr const char* kPluginFile = {quoted(constants.PLUGIN_FILE)};
// Format and version of the files that saveState writes.
constexpr const char* kStateFormat = {quoted(constants.STATE_FORMAT)};
constexpr const char* kStateVersion = {quoted(constants.STATE_VERSION)};
// Id of a stream that stands still while others step, where there are recurrent states: these know no positions.
constexpr int64_t kNoToken = {constants.NO_TOKEN};
// First stream position that 47 bits do not hold: positions travel as t >> 16 and t & 0xffff, two int32.
constexpr int64_t kPositionLimit = {power_of_two(POSITION_LIMIT)};
// Axes of a tensor.
constexpr int64_t kMaxRank = {constants.MAX_RANK};
constexpr int64_t kMaxTensorBytes = {power_of_two(constants.MAX_TENSOR_BYTES)};

}}  // namespace sinkrt
"""


def sets() -> str:
    """Return the contract's sets of names as arrays, and a constant for each kind of state."""
    lines = ["struct Dtype { const char* name; int64_t bytes; const char* safetensors; };"]
    rows = ", ".join(
        f"{{{quoted(name)}, {size}, {quoted(constants.SAFETENSORS_DTYPES[name])}}}"
        for name, size in constants.DTYPE_BYTES.items()
    )
    lines.append(f"constexpr Dtype kDtypes[] = {{{rows}}};")
    lines += [f"constexpr const char* {constant(kind)} = {quoted(kind)};" for kind in constants.ALL_KINDS]
    for name, value in SETS.items():
        elements = ", ".join(constant(item) if item in constants.ALL_KINDS else quoted(item) for item in value)
        lines.append(f"constexpr const char* {constant(name)}[] = {{{elements}}};")
    return "\n".join(lines)


SETS: Mapping[str, tuple[str, ...]] = {
    name.lower(): value
    for name, value in vars(constants).items()
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value)
}


def constant(name: str) -> str:
    """Return the C++ constant's name: window_k -> kWindowK."""
    return "k" + "".join(part.capitalize() for part in name.split("_"))


def power_of_two(value: int) -> str:
    """Return an expression that shows which power a limit is."""
    exponent = value.bit_length() - 1
    assert value == 1 << exponent
    return f"int64_t{{1}} << {exponent}"


# --- the manifest ----------------------------------------------------------------------------------------------------


def cpp_type(hint: Any) -> str:
    """Return the C++ type of a field's type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # the schema's only unions are "X | None"
        inner = next(argument for argument in arguments if argument is not type(None))
        return f"std::optional<{cpp_type(inner)}>"
    if origin is tuple:  # std::vector<bool> has no elements to read into
        return f"std::vector<{'uint8_t' if arguments[0] is bool else cpp_type(arguments[0])}>"
    if origin is not None and issubclass(origin, Mapping):
        return f"std::map<std::string, {cpp_type(arguments[1])}>"
    if dataclasses.is_dataclass(hint):
        return str(hint.__name__)
    return {str: "std::string", int: "int64_t", float: "double", bool: "bool"}[hint]


INITIAL = {"int64_t": " = 0", "double": " = 0", "bool": " = false"}


def fields_of(cls: type) -> Iterable[tuple[dataclasses.Field[Any], Any]]:
    """Return the fields of a class with their type hints."""
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def struct(cls: type) -> str:
    """Return a struct with its fields, their documentation and its methods."""
    summary = (cls.__doc__ or "").split("\n\n")[0].replace("\n    ", " ")
    lines = [f"// {summary}", f"struct {cls.__name__} {{"]
    for field, hint in fields_of(cls):
        kind = cpp_type(hint)
        choices = " | ".join(rule_of(field).one_of)
        note = rule_of(field).doc + (f": {choices}" if choices else "")
        lines.append(f"  {kind} {field.name}{INITIAL.get(kind, '')};  // {note}")
    if cls in METHODS:
        lines.append("\n" + METHODS[cls])
    return "\n".join([*lines, "};"])


def manifest_header() -> str:
    """Return include/sinkrt/manifest.h."""
    structs = "\n\n".join(struct(cls) for cls in CLASSES)
    return f"""{NOTICE}// The bundle's manifest, all that a runtime knows of a model.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sinkrt/constants.h"
#include "sinkrt/error.h"
#include "sinkrt/ring.h"

namespace sinkrt {{

// Bytes of one element of a dtype ({", ".join(constants.DTYPE_BYTES)}); 0: unknown.
int64_t dtypeBytes(const std::string& dtype);
// Bytes of a tensor; the largest int64 if there are more. Allocates nothing.
int64_t tensorBytes(const std::vector<int64_t>& shape, const std::string& dtype);

{structs}
{MANIFEST_FUNCTIONS}
}}  // namespace sinkrt
"""


def schema_header() -> str:
    """Return src/bundle/schema.h."""
    reads = "\n".join(f"void read(const Json& raw, const std::string& where, {cls.__name__}& out);" for cls in CLASSES)
    writes = "\n".join(f"Json toJson(const {cls.__name__}& value);" for cls in CLASSES)
    checks = "\n".join(f"void check(const {cls.__name__}& value);" for cls in CLASSES if hasattr(cls, CROSS_CHECK))
    return f"""{NOTICE}// Sets of names, and readers and writers of the manifest's structs.
#pragma once

#include <cstdint>
#include <string>

#include "bundle/json.h"
#include "sinkrt/manifest.h"

namespace sinkrt {{

{sets()}

// Read strictly: no unknown key, no missing one, no wrong type, and every rule of the contract. where: name for
// messages. Throw Error(kBundle).
{reads}

{writes}

// Rules between the fields of one struct: by hand, in checks.cpp. Throw Error(kBundle).
{checks}

}}  // namespace sinkrt
"""


def rule_lines(cls: type) -> Iterable[str]:
    """Return the checks of single fields."""
    for field in dataclasses.fields(cls):
        rule, label, value = rule_of(field), quoted(label_of(cls, field)), f"out.{field.name}"
        if rule.least is not None:
            yield f"  atLeast({label}, {value}, {rule.least}{', ' + quoted(rule.unit) if rule.unit else ''});"
        if rule.one_of:
            name = next(name for name, value in SETS.items() if value == rule.one_of)
            yield f"  oneOf({label}, {value}, {constant(name)});"
        if rule.is_path:
            yield f"  pathInside({label}, {value});"
        if rule.is_digest:
            yield f"  digest({label}, {value});"
    if hasattr(cls, CROSS_CHECK):
        yield "  check(out);"


def reader(cls: type) -> str:
    """Return a struct's reader."""
    calls = []
    for field in dataclasses.fields(cls):
        is_required = field.default is dataclasses.MISSING
        assert is_required or field.default is None
        calls.append(f".{'take' if is_required else 'takeIfThere'}({quoted(field.name)}, out.{field.name})")
    body = "\n".join([f"  Fields(raw, where){''.join(calls)}.end();", *rule_lines(cls)])
    return f"void read(const Json& raw, const std::string& where, {cls.__name__}& out) {{\n{body}\n}}\n"


def writer(cls: type) -> str:
    """Return a struct's writer."""
    members = [f"out.add({quoted(f.name)}, toJson(value.{f.name}));" for f in dataclasses.fields(cls)]
    body = "\n  ".join(["Json out = Json::object();", *members, "return out;"])
    return f"Json toJson(const {cls.__name__}& value) {{\n  {body}\n}}\n"


def schema_source() -> str:
    """Return src/bundle/schema.cpp."""
    functions = "\n".join(reader(cls) + "\n" + writer(cls) for cls in CLASSES)
    return f"""{NOTICE}#include "bundle/schema.h"

#include "bundle/json_fields.h"

namespace sinkrt {{

{functions}
}}  // namespace sinkrt
"""


OUTPUTS: Mapping[str, Callable[[], str]] = {
    "include/sinkrt/constants.h": constants_header,
    "include/sinkrt/manifest.h": manifest_header,
    "include/sinkrt/sampling.h": sampling_header,
    "include/sinkrt/sampling_options.h": options_header,
    "include/sinkrt/sinkrt.h": lambda: c_interface(CPP / "include/sinkrt/sinkrt.h"),
    "src/bundle/schema.h": schema_header,
    "src/bundle/schema.cpp": schema_source,
    "src/capi_sampling.h": c_options,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
