// cos and sin of stream positions from integer phases, exact at any position below 2^47.
#pragma once

#include <cstdint>

#include "types.h"

namespace sinkexport {

struct StreamAnglesParams {
  int batch = 0;                        // B
  int num_tokens = 1;                   // T
  int num_frequencies = 0;              // R/2
  int behind = 0;                       // tokens: 0 for a token's own rotation, C - 1 for the shift of the sinks
  const int32_t* position = nullptr;    // [B, 2]: t >> 16 and t & 0xffff of the first token
  const uint32_t* frequency = nullptr;  // [R/2], turns a token in units of 2^-32; device
  float* cos = nullptr;                 // [B, T, R/2], of max(0, t - behind) * frequency turns
  float* sin = nullptr;
};

// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* streamAnglesProblem(const StreamAnglesParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if streamAnglesProblem says so.
cudaError_t launchStreamAngles(const StreamAnglesParams& params, cudaStream_t stream);

}  // namespace sinkexport
