"""C++ of the sampling options: the struct and its ranges, the C interface's fields, and one from the other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cpp_text import NOTICE, quoted
from sinkrt.contract.sampling import SEED_LIMIT, SamplingParams, range_of

BEGIN, END = "  /* generated: sampling options */\n", "  /* end of what is generated */\n"


def sampling_type(option: dataclasses.Field[Any]) -> str:
    """Return the C++ type of an option. One of 64 bits and no default is a seed."""
    if range_of(option).most == SEED_LIMIT - 1:
        return "std::optional<uint64_t>"
    return {"int": "int64_t", "float": "double"}[str(option.type)]


def sampling_header() -> str:
    """Return include/sinkrt/sampling.h, which device code includes too."""
    lines = []
    for option in dataclasses.fields(SamplingParams):
        default = "" if option.default is None else f" = {option.default}"
        lines.append(f"  {sampling_type(option)} {option.name}{default};  // {range_of(option).doc}")
    members = "\n".join(lines)
    return f"""{NOTICE}// Options of sampling.
#pragma once

#include <cstdint>
#include <optional>

namespace sinkrt {{

struct SamplingParams {{
{members}

  // Throws Error(kUsage) for a value out of range.
  void check() const;
  // A copy with a seed.
  SamplingParams resolved() const;
}};

}}  // namespace sinkrt
"""


def options_header() -> str:
    """Return include/sinkrt/sampling_options.h."""
    rows = []
    for option in dataclasses.fields(SamplingParams):
        found = range_of(option)
        if option.default is None:
            continue  # all values of its type are allowed
        member = f"&SamplingParams::{option.name}"
        pair = f"{member}, nullptr" if sampling_type(option) == "double" else f"nullptr, {member}"
        least, most = (f"{float(limit).hex()}" for limit in (found.least, found.most))
        rows.append(f"{{{quoted(option.name)}, {quoted(found.expected)}, {least}, {most}, {pair}}}")
    return f"""{NOTICE}// Ranges of the options of sampling.
#pragma once

#include <cstdint>

#include "sinkrt/sampling.h"

namespace sinkrt {{

// One option: its name, its range in words and in numbers, both ends included, and where it is: one of the two.
struct SamplingOption {{
  const char* name;
  const char* expected;
  double least;
  double most;
  double SamplingParams::* number;
  int64_t SamplingParams::* integer;
}};

constexpr SamplingOption kSamplingOptions[] = {{{", ".join(rows)}}};

}}  // namespace sinkrt
"""


def c_interface(header: Path) -> str:
    """Return include/sinkrt/sinkrt.h with the region of the sampling options anew."""
    before, _, rest = header.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, "no region of generated options in sinkrt.h"
    lines = []
    for option in dataclasses.fields(SamplingParams):
        kind = sampling_type(option).removeprefix("std::optional<").removesuffix(">")
        note = range_of(option).zero
        if option.default is not None:
            default = f"{option.default:g}"
            note = f"0: {note}" if default == "0" else f"0 or {default}: {note}"
        else:
            note = "the same seed and stream draw the same tokens"
        lines.append(f"  {kind} {option.name}; /* {note} */\n")
    return before + BEGIN + "".join(lines) + END + after


def c_options() -> str:
    """Return src/capi_sampling.h: the C interface's options by name, where 0 that is out of range is the default."""
    lines = []
    for option in dataclasses.fields(SamplingParams):
        value = f"given.{option.name}"
        if option.default is not None and range_of(option).least > 0:
            value = f"{value} == 0 ? {option.default} : {value}"
        lines.append(f"  out.{option.name} = {value};")
    assignments = "\n".join(lines)
    return f"""{NOTICE}#pragma once

#include "sinkrt/sampling.h"
#include "sinkrt/sinkrt.h"

namespace sinkrt {{

// Options of the C interface. Zero is the default of each.
inline SamplingParams samplingParams(const sinkrt_sampling& given) {{
  SamplingParams out;
{assignments}
  return out;
}}

}}  // namespace sinkrt
"""
