// Pick the next token: greedy, temperature, top-k, top-p and repetition penalty. Twin of runtime/sinkrt/sampler.py: the
// same seed draws the same numbers there and here, on any backend.
#pragma once

#include <cstdint>
#include <vector>

#include "sinkrt/ring.h"
#include "sinkrt/sampling.h"

namespace sinkrt {

// The upper 64 bits of a * b.
SINKRT_HOST_DEVICE inline uint64_t mulHigh(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// 64 random bits for this seed and position: the first output of Philox4x64-10 (Salmon et al., SC 2011) with the key
// (seed, 0) and the counter position + 1, as NumPy numbers them. Needs no state.
SINKRT_HOST_DEVICE inline uint64_t philox(uint64_t seed, uint64_t position) {
  uint64_t c0 = position + 1, c1 = 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t high0 = mulHigh(0xd2e7470ee14c6c93u, c0), low0 = 0xd2e7470ee14c6c93u * c0;
    const uint64_t high1 = mulHigh(0xca5a826395121157u, c2), low1 = 0xca5a826395121157u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9e3779b97f4a7c15u;
    k1 += 0xbb67ae8584caa73bu;
  }
  return c0;
}

// A number in [0, 1) for this seed and position.
SINKRT_HOST_DEVICE inline double uniform(uint64_t seed, int64_t position) {
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
  std::vector<float> weights_;  // [vocab] penalized logits, then the candidates' weights
  std::vector<float> sorted_;   // [vocab] scratch
  std::vector<int64_t> ids_;    // [vocab] the candidates
  std::vector<int64_t> order_;  // [vocab] scratch
};

}  // namespace sinkrt
