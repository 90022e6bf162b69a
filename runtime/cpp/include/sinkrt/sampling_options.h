// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
// Ranges of the options of sampling.
#pragma once

#include <cstdint>

#include "sinkrt/sampling.h"

namespace sinkrt {

// One option: its name, its range in words and in numbers, both ends included, and where it is: one of the two.
struct SamplingOption {
  const char* name;
  const char* expected;
  double least;
  double most;
  double SamplingParams::* number;
  int64_t SamplingParams::* integer;
};

constexpr SamplingOption kSamplingOptions[] = {
    {"temperature", "0 .. 100 (0: greedy)", 0x0.0p+0, 0x1.9000000000000p+6, &SamplingParams::temperature, nullptr},
    {"top_k", "0 .. 2147483647 (0: all tokens)", 0x0.0p+0, 0x1.fffffffc00000p+30, nullptr, &SamplingParams::top_k},
    {"top_p", "a number in (0, 1]", 0x0.0000000000001p-1022, 0x1.0000000000000p+0, &SamplingParams::top_p, nullptr},
    {"repetition_penalty", "0.01 .. 100 (1: none)", 0x1.47ae147ae147bp-7, 0x1.9000000000000p+6,
     &SamplingParams::repetition_penalty, nullptr}};

}  // namespace sinkrt
