// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
// Options of sampling.
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

}  // namespace sinkrt
