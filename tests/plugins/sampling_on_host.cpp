// Runs the sampling kernel on the host, as a block of one thread, and compares its picks with the host's sampler.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda_words.h"

namespace {

struct Index {
  unsigned x, y;
};
const Index threadIdx{0, 0}, blockIdx{0, 0}, blockDim{1, 1}, gridDim{1, 1};

void __syncthreads() {}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int) {
  return value;
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int) {
  return value;
}
uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
void atomicAdd(unsigned long long* sum, unsigned long long value) {
  *sum += value;
}

using std::isfinite;
using std::isnan;
using std::min;

}  // namespace

#define SINKRT_SAMPLING_THREADS 1
#include "cuda/sampling.cuh"

int main() {
  constexpr int kPicks = 3000, kVocab = 5000, kCapacity = 64, kHistory = 4;
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(kVocab), raw(kVocab, 1.0f), scratch(kVocab);
  sinkrt::Sampler sampler(kVocab);
  int differ = 0;
  for (int i = 0; i < kPicks; ++i) {
    for (float& logit : logits) {
      logit = normal(random);
      if (i % 3 == 0) logit = std::round(logit);  // ties
    }
    std::vector<int32_t> recent(kCapacity, -1);
    if (i % 2 == 1) {
      for (int32_t& id : recent) id = static_cast<int32_t>(random() % kVocab);
    }
    sinkrt::SamplingParams params;
    params.seed = random();
    const int kind = i % 6;
    if (kind != 0) params.temperature = 0.3 + 0.3 * static_cast<double>(random() % 6);
    if (kind == 2 || kind == 4) params.top_k = 1 + static_cast<int64_t>(random() % 300);
    if (kind == 3 || kind == 4) params.top_p = 0.05 + 0.0009 * static_cast<double>(random() % 1000);
    if (i % 2 == 1) params.repetition_penalty = 1.3;
    const auto position = static_cast<int64_t>(random() % (uint64_t{1} << 45));

    const std::vector<int64_t> seen(recent.begin(), recent.end());
    const int64_t want = sampler.sample(logits.data(), seen.data(), kCapacity, position, params);
    const sinkrt::cuda::DeviceSampling sampling = sinkrt::cuda::deviceSampling(params, kVocab);
    const int32_t no_ends = 0;
    int32_t id = -1, parts[2] = {static_cast<int32_t>(position >> 16), static_cast<int32_t>(position & 0xffff)};
    int32_t active = 0, ended = 0, invalid = 0, num_ids = 0, history[kHistory];
    const bool marks_idle = i % 4 < 2;
    const sinkrt::cuda::SamplingArgs args{1,          kVocab,         kCapacity, kHistory, logits.data(),
                                          raw.data(), scratch.data(), &id,       parts,    false,
                                          marks_idle, &sampling,      nullptr,   &no_ends, recent.data(),
                                          &active,    &ended,         &invalid,  &num_ids, history};
    sinkrt::cuda::sample(args);
    const bool right = id == want && active == 1 && ended == 0 && num_ids == 1 && history[0] == want &&
                       recent[position % kCapacity] == want;
    sinkrt::cuda::commit(args);
    const int64_t next = static_cast<int64_t>(parts[0]) << 16 | parts[1];
    ended = 1;
    sinkrt::cuda::sample(args);
    const bool stands = active == 0 && num_ids == 1 && id == (marks_idle ? sinkrt::kNoToken : want);
    differ += !right || !stands || next != position + 1 || logits != raw;
  }
  std::printf("%d picks, %d differ\n", kPicks, differ);
  return differ == 0 ? 0 : 1;
}
