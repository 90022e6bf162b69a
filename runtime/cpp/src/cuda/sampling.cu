#include "cuda/sampling.h"

#include "cuda/sampling.cuh"

namespace sinkrt::cuda {

cudaError_t launchSample(const SamplingArgs& args, cudaStream_t stream) {
  sample<<<args.batch, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launchCommit(const SamplingArgs& args, cudaStream_t stream) {
  constexpr int kCommitThreads = 256;
  const dim3 grid((args.vocab_size + kCommitThreads - 1) / kCommitThreads, args.batch);
  commit<<<grid, kCommitThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace sinkrt::cuda
