// Pick the next token: greedy, temperature, top-k, top-p and repetition penalty. Twin of runtime/sinkrt/sampler.py: the
// same seed draws the same numbers there and here, on any backend.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace sinkrt {

struct SamplingParams {
  double temperature = 0.0;         // 0: greedy
  int64_t top_k = 0;                // 0: all tokens
  double top_p = 1.0;               // (0, 1]
  double repetition_penalty = 1.0;  // 1: none
  std::optional<uint64_t> seed;     // none: drawn by `resolved`

  // Throws Error(kUsage) for a value out of range.
  void check() const;
  // A copy with a seed.
  SamplingParams resolved() const;
};

// 64 random bits for this seed and position: the first output of Philox4x64-10 (Salmon et al., SC 2011) with this key
// and the counter that follows `position`. Needs no state.
uint64_t philox(uint64_t seed, uint64_t position);

// A number in [0, 1) for this seed and position.
inline double uniform(uint64_t seed, int64_t position) {
  return static_cast<double>(philox(seed, static_cast<uint64_t>(position)) >> 11) * 0x1p-53;
}

// Samples one stream. Holds scratch memory, allocated once, and no history.
class Sampler {
 public:
  explicit Sampler(int64_t vocab_size);

  // The token that follows. logits: [vocab], left as they are. recent: [num_recent] tokens for the repetition penalty,
  // negative entries are none. params: checked, with a seed. position: where in the stream the new token will lie.
  // Throws Error(kBackend) if the logits are not numbers. Allocates nothing.
  int64_t sample(const float* logits, const int64_t* recent, int64_t num_recent, int64_t position,
                 const SamplingParams& params);

 private:
  int64_t nucleus(int64_t count, double top_p);

  int64_t vocab_size_;
  std::vector<float> weights_;  // [vocab] penalized logits, then weights, the i-th of candidate ids_[i]
  std::vector<float> sorted_;   // [vocab] for the k-th largest
  std::vector<int32_t> ids_;    // [vocab]
  std::vector<int32_t> order_;  // [vocab]
};

}  // namespace sinkrt
