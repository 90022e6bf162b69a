#include "stream_angles.h"

#include <algorithm>

#include "angles.cuh"
#include "problem.h"
#include "warp.cuh"

namespace sinkexport {
namespace {

__global__ void streamAngles(const StreamAnglesParams p) {
  const int count = p.batch * p.num_tokens * p.num_frequencies;
  for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < count; index += gridDim.x * blockDim.x) {
    const int frequency = index % p.num_frequencies;
    const int token = index / p.num_frequencies % p.num_tokens;
    const int stream = index / p.num_frequencies / p.num_tokens;
    const int64_t t = streamPosition(p.position, stream) + token - p.behind;
    cosSin(t > 0 ? t : 0, p.frequency[frequency], p.cos[index], p.sin[index]);
  }
}

}  // namespace

const char* streamAnglesProblem(const StreamAnglesParams& p) {
  if (p.batch < 1 || p.num_tokens < 1 || p.num_frequencies < 1) {
    return explain("batch, num_tokens, num_frequencies: received %d, %d, %d, expected at least 1 of each", p.batch,
                   p.num_tokens, p.num_frequencies);
  }
  if (int64_t{p.batch} * p.num_tokens > INT32_MAX / p.num_frequencies) {
    return explain("batch * num_tokens * num_frequencies: expected below 2^31; run shorter chunks");
  }
  if (p.behind < 0) return explain("behind: received %d, expected >= 0", p.behind);
  const struct {
    const char* name;
    const void* pointer;
  } all[] = {{"position", p.position}, {"frequency", p.frequency}, {"cos", p.cos}, {"sin", p.sin}};
  for (const auto& one : all) {
    if (one.pointer == nullptr) return explain("%s: received null, expected a device pointer", one.name);
  }
  return nullptr;
}

cudaError_t launchStreamAngles(const StreamAnglesParams& params, cudaStream_t stream) {
  if (streamAnglesProblem(params) != nullptr) return cudaErrorInvalidValue;
  constexpr int kThreads = 128, kMostBlocks = 4096;
  const int count = params.batch * params.num_tokens * params.num_frequencies;
  const int blocks = std::min(divideUp(count, kThreads), kMostBlocks);
  streamAngles<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace sinkexport
