#include "stream_angles.h"

#include "angles.cuh"

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

cudaError_t launchStreamAngles(const StreamAnglesParams& params, cudaStream_t stream) {
  const bool is_valid = params.batch >= 1 && params.num_tokens >= 1 && params.num_frequencies >= 1 &&
                        params.behind >= 0 && params.position != nullptr && params.frequency != nullptr &&
                        params.cos != nullptr && params.sin != nullptr;
  const int64_t count = int64_t{params.batch} * params.num_tokens * params.num_frequencies;
  if (!is_valid || count > INT32_MAX) return cudaErrorInvalidValue;
  constexpr int kThreads = 128;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  streamAngles<<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace sinkexport
