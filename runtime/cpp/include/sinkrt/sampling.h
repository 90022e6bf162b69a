// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
// Options of sampling and their ranges.
#pragma once

#include <cstdint>
#include <optional>

namespace sinkrt {

struct SamplingParams {
  double temperature = 0.0;         // what logits are divided by; 0: greedy
  int64_t top_k = 0;                // keep the k likeliest; 0: all tokens
  double top_p = 1.0;               // keep the smallest set of probability p
  double repetition_penalty = 1.0;  // above 1: tokens in the cache become less likely; 1: none
  std::optional<uint64_t> seed;     // the same seed and stream draw the same tokens; none: drawn by `resolved`

  // Throws Error(kUsage) for a value out of range.
  void check() const;
  // A copy with a seed.
  SamplingParams resolved() const;
};

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
