// The end of a step on the device: pick each stream's next token from its logits and hand it to the engine's inputs, so
// that many steps run without the host. What is picked is what sampler.h picks: the same order of penalty, temperature,
// top-k and top-p, the same draws, sums in fixed point so that runs repeat to the bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sinkrt/sampling.h"

namespace sinkrt::cuda {

// SamplingParams of one stream, as the device takes them.
struct DeviceSampling {
  double top_p;
  float temperature;  // 0: greedy
  float penalty;      // 1: none
  uint64_t seed;
  int32_t top_k;  // 0: all
};

inline DeviceSampling deviceSampling(const SamplingParams& params, int64_t vocab_size) {
  DeviceSampling out{};
  out.top_p = params.top_p;
  out.temperature = static_cast<float>(params.temperature);
  out.penalty = static_cast<float>(params.repetition_penalty);
  out.seed = params.seed.value_or(0);
  out.top_k = static_cast<int32_t>(params.top_k < vocab_size ? params.top_k : 0);
  return out;
}

// All pointers are device pointers. B streams, a vocabulary of V, C = S + W tokens in the cache, at most H steps in a
// row.
struct SamplingArgs {
  int32_t batch;
  int32_t vocab_size;
  int32_t capacity;
  int32_t history_size;  // H

  float* logits;            // [B, V] after each stream's last token
  const float* raw_logits;  // [B, V] what the engine wrote, idle streams' rows included
  float* scratch;           // [B, V]

  // The engine's inputs: int32 [B] and [B, 2] (t >> 16, t & 0xffff), or, with `wide`, int64 [B] and [B].
  void* ids;
  void* position;
  bool wide;
  bool marks_idle;  // streams that take no token have kNoToken for an id

  const DeviceSampling* sampling;  // [B]
  const int32_t* end_ids;          // [*num_end_ids] tokens that end a text: picked, never fed
  const int32_t* num_end_ids;
  int32_t* recent_ids;  // [B, C] the id of token t at t mod C, -1: none
  int32_t* active;      // [B] 1: this step counts
  int32_t* ended;       // [B] 1: takes no more tokens
  int32_t* invalid;     // [B] 1: its logits were no numbers
  int32_t* num_ids;     // [B] tokens picked and fed so far
  int32_t* history;     // [B, H] they
};

// Pick a token for every stream that has not ended, one block each; sets `active`.
cudaError_t launchSample(const SamplingArgs& args, cudaStream_t stream);

// After the engine has run: active streams get its logits and go on to their next position.
cudaError_t launchCommit(const SamplingArgs& args, cudaStream_t stream);

}  // namespace sinkrt::cuda
