// Stream positions as kernels receive them, and their angles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sinkrt/ring.h"

namespace sinkexport {

// Stream position of a run's first token. position: int32 [B, 2], t >> 16 and t & 0xffff.
__device__ inline int64_t streamPosition(const int32_t* position, int stream) {
  return int64_t{position[2 * stream]} * 65536 + position[2 * stream + 1];
}

// cos and sin of t * frequency turns: only the final phase, in [-pi, pi), is rounded.
__device__ inline void cosSin(int64_t t, uint32_t frequency, float& cosine, float& sine) {
  const float half_turns = static_cast<float>(static_cast<int32_t>(sinkrt::phase(t, frequency))) * 0x1p-31f;
  sincospif(half_turns, &sine, &cosine);
}

}  // namespace sinkexport
