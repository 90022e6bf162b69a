// Launches of sink attention.
#include "sink_attention.h"

#include "device.h"
#include "overlap.cuh"
#include "sink_attention_merge.cuh"
#include "sink_attention_plan.cuh"

namespace sinkexport {
namespace {

using namespace sink_attention;

// Bytes that memory moves in a microsecond.
cudaError_t findMemorySpeed(double& bytes_of_us) {
  int device = 0, memory_khz = 0, memory_bits = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&memory_bits, cudaDevAttrGlobalMemoryBusWidth, device);
  constexpr double kOfPeak = 0.88;                          // what is reached of the data sheet's
  constexpr double kUsualSpeed = 2.7e6;                     // where the device does not report it
  const double peak = 2e-3 * memory_khz * memory_bits / 8;  // two transfers a clock
  bytes_of_us = peak > 0 ? kOfPeak * peak : kUsualSpeed;
  return error;
}

// Blocks of one multiprocessor.
int residentBlocks(const AttendKernel& kernel, const Device& device) {
  const int blocks = device.shared_bytes_of_all / (kernel.shared_bytes + kReservedSharedBytes);
  return blocks < 1 ? 1 : (blocks > kernel.blocks_of_sm ? kernel.blocks_of_sm : blocks);
}

// Blocks are placed as those of the launch before end. If no merge comes in between, they would crowd on the first
// multiprocessors that are free, and most would wait for those: so each takes as much shared memory as is its share,
// or half of it where two launches find room beside each other.
int sharedBytes(const SinkAttentionParams& p, const Shape& shape, Cut cut, const Device& device) {
  const int needed = shape.kernel.shared_bytes + (cut.is_cluster ? shape.kernel.cluster_bytes : 0);
  const int blocks = shape.row_blocks * cut.num_splits;
  const int places = device.multiprocessors * residentBlocks(shape.kernel, device);
  if ((cut.num_splits > 1 && !cut.is_cluster) || isPrefill(p) || blocks > places) return needed;
  int share = device.shared_bytes_of_all / divideUp(blocks, device.multiprocessors);
  if (p.settled_states && share / 2 - kReservedSharedBytes >= needed) share /= 2;
  const int most = share < device.shared_bytes ? share : device.shared_bytes;
  const int padded = (most - kReservedSharedBytes) / 128 * 128;
  return padded > needed ? padded : needed;
}

// Blocks of a cluster, at most: 8 wherever there are clusters.
int mostInCluster(const Device& device) {
  return CUDART_VERSION >= 12030 && device.overlaps ? 8 : 0;
}

template <typename Half>
cudaError_t launch(const SinkAttentionParams& p, void* workspace, cudaStream_t stream) {
  Device device;
  double memory_bytes_of_us = 0;
  cudaError_t error = describeDevice(device);
  if (error == cudaSuccess) error = findMemorySpeed(memory_bytes_of_us);
  if (error != cudaSuccess) return error;

  const Shape shape(p);
  const AttendKernel& kernel = shape.kernel;
  const int num_sms = device.multiprocessors < kMostSms ? device.multiprocessors : kMostSms;
  const Cut cut = shape.cut(p, num_sms, memory_bytes_of_us, residentBlocks(kernel, device), mostInCluster(device));
  Workspace space(p, cut, workspace);
  AttendArgs& args = space.args;
  args.tiles_per_split = divideUp(shape.tiles, cut.num_splits);
  args.row_warps = shape.row_warps;
  const dim3 tokens(p.num_tokens, p.batch);

  if (space.is_prepared) {
    error = launchOverlapping(&prepareChunk<Half>, tokens, dim3(kChunkThreads), turnsFloats(p.head_dim) * sizeof(float),
                              device.overlaps, stream, space.chunk);
    if (error != cudaSuccess) return error;
  }

  // The most there is, in every launch alike: another thread may launch the same kernel with more than this one needs.
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&args};
  const dim3 grid(shape.row_blocks, cut.num_splits);
  // All kernels wait for the one before them where they need its results, and may be placed earlier.
  error = launchOverlapping(kernel.function, grid, dim3(kernel.num_threads), sharedBytes(p, shape, cut, device),
                            device.overlaps, stream, arguments, cut.is_cluster ? cut.num_splits : 1);
  if (error != cudaSuccess) return error;
  if (cut.num_splits > 1 && !cut.is_cluster) {
    error = launchOverlapping(&mergeSplits<Half>, dim3(p.batch * p.num_q_heads * p.num_tokens), dim3(kMergeThreads),
                              kMergeWarps * p.head_dim * sizeof(float), device.overlaps, stream, args);
    if (error != cudaSuccess) return error;
  }
  if (isPrefill(p)) {  // after attention: early queries need keys that later tokens evict
    error = launchOverlapping(&writeChunk<Half>, tokens, dim3(kChunkThreads), 0, device.overlaps, stream, args);
  }
  return error;
}

}  // namespace

size_t sinkAttentionWorkspaceBytes(const SinkAttentionParams& p) {
  if (shapeProblem(p) != nullptr) return 0;
  const Shape shape(p);
  const int most_splits = shape.mostSplits(p, kMostSms * shape.kernel.blocks_of_sm);
  return Workspace(p, Cut{most_splits, false}, nullptr).num_bytes;
}

cudaError_t launchSinkAttention(const SinkAttentionParams& p, void* workspace, cudaStream_t stream) {
  if (sinkAttentionProblem(p) != nullptr || reinterpret_cast<uintptr_t>(workspace) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  if (workspace == nullptr && sinkAttentionWorkspaceBytes(p) > 0) return cudaErrorInvalidValue;
  return p.dtype == DType::kFloat16 ? launch<__half>(p, workspace, stream)
                                    : launch<__nv_bfloat16>(p, workspace, stream);
}

}  // namespace sinkexport
