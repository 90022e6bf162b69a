// y = x . W^T * scale + bias with W in INT8, y = x . W^T + bias with W of x's type or in INT4 (linear.h says which
// shapes).
//
// Both kernels multiply on the tensor cores, weights as the left factor (16 outputs a tile) and tokens as the right one
// (8 a tile): even for one token that takes fewer instructions a weight than multiplying and adding one by one, so that
// reading the weights is what is left. A sum over k has no order of its own. So lanes take 16 consecutive weights of a
// row (one 16-byte load) as their share of four k16 tiles, and the same k of the tokens: in tile s lane t of four has
// k = 16 t + 4 s .. + 3 of each 64. A load of half weights is 8 of them, for two tiles: k = 8 t + 4 s .. + 3 of each 32
// (more tokens: two loads, and k as with INT8). INT4 weights lie as they are multiplied: a load of 16 bytes is a lane's
// share of four tiles, for both of its rows, and k as with one load of half weights. Two tiles are summed from zero;
// the block's scale joins as that is added to the rest.
//
// - Up to 16 tokens: linear_few.cuh.
// - More tokens: linear_many.cuh.
#include "linear.h"

#include <algorithm>

#include "linear.cuh"
#include "linear_few.cuh"
#include "linear_many.cuh"
#include "problem.h"

namespace sinkexport {
namespace linear {
namespace {

constexpr int kFewTokens = 16;
constexpr int kMaxTokens = 1 << 16;

// --- launches ---

// Outputs that the block with the most of them has, if tiles have this many.
int mostOutputs(const LinearParams& p, int rows, const Device& device) {
  return divideUp(divideUp(p.num_outputs, rows), kFewBlocks * device.multiprocessors) * rows;
}

// Up to 16 tokens by tiles of kRowTiles * 16 outputs, if shared memory holds them and no block has more outputs than
// with the lowest ones, `slack` eighths apart. Taller tiles read the tokens less often, which come from the L2 cache,
// and have fewer ends; lower ones spread better. True: launched.
template <typename Weight, typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages, int kLine>
bool launchTall(const LinearParams& p, const Device& device, cudaStream_t stream, cudaError_t& error, int slack = 1) {
  if (fewSharedBytes<Weight, kLine>(kRowTiles, p.num_rows, kWarps, kStages) > device.shared_bytes) return false;
  if (8 * mostOutputs(p, 16 * kRowTiles, device) > (8 + slack) * mostOutputs(p, 16, device)) return false;
  error = launchFew<Weight, Half, kRowTiles, kTokenTiles, kWarps, kStages, kLine>(OneMatrix{p}, device, stream);
  return true;
}

template <typename Half>
cudaError_t launchFew(const LinearParams& p, const Device& device, cudaStream_t stream, Half /*weight*/) {
  if (p.num_rows <= 8) return launchFew<Half, Half, 1, 1, 8, 3>(OneMatrix{p}, device, stream);
  cudaError_t error = cudaSuccess;
  constexpr int kManyOutputs = 1 << 15;
  if (p.num_outputs >= kManyOutputs && launchTall<Half, Half, 2, 2, 4, 3, kLineBytes>(p, device, stream, error)) {
    return error;
  }
  return launchFew<Half, Half, 1, 2, 8, 3>(OneMatrix{p}, device, stream);
}

template <typename Half>
cudaError_t launchFew(const LinearParams& p, const Device& device, cudaStream_t stream, int8_t /*weight*/) {
  if (p.num_rows <= 8) return launchFew<int8_t, Half, 1, 1, 8, 3>(OneMatrix{p}, device, stream);
  constexpr int kHalfLine = kLineBytes / 2;
  cudaError_t error = cudaSuccess;
  if (launchTall<int8_t, Half, 4, 2, 4, 3, kHalfLine>(p, device, stream, error) ||
      launchTall<int8_t, Half, 3, 2, 4, 4, kHalfLine>(p, device, stream, error)) {
    return error;
  }
  if (fewSharedBytes<int8_t, kHalfLine>(2, p.num_rows, 8, 4) <= device.shared_bytes) {
    return launchFew<int8_t, Half, 2, 2, 8, 4, kHalfLine>(OneMatrix{p}, device, stream);
  }
  return launchFew<int8_t, Half, 1, 2, 8, 2>(OneMatrix{p}, device, stream);
}

template <typename Half>
cudaError_t launchFew(const LinearParams& p, const Device& device, cudaStream_t stream, Int4 /*weight*/) {
  constexpr int kHalfLine = kLineBytes / 2;
  cudaError_t error = cudaSuccess;
  if (p.num_rows <= 8) {
    if (p.num_rows <= 4 && launchTall<Int4, Half, 2, 1, 4, 2, 2 * kLineBytes>(p, device, stream, error, 0))
      return error;
    if (p.num_rows <= 2 && launchTall<Int4, Half, 3, 1, 6, 2, kLineBytes>(p, device, stream, error)) return error;
    if (p.num_rows > 2 && launchTall<Int4, Half, 3, 1, 4, 2, kLineBytes>(p, device, stream, error)) return error;
    if (p.num_rows <= 4) return launchFew<Int4, Half, 1, 1, 8, 2>(OneMatrix{p}, device, stream);
    return launchFew<Int4, Half, 2, 1, 8, 3, kHalfLine>(OneMatrix{p}, device, stream);
  }
  if (launchTall<Int4, Half, 3, 2, 4, 2, kHalfLine>(p, device, stream, error)) return error;
  if (fewSharedBytes<Int4, kHalfLine>(2, p.num_rows, 4, 2) <= device.shared_bytes) {
    return launchFew<Int4, Half, 2, 2, 8, 2, kHalfLine>(OneMatrix{p}, device, stream);
  }
  return launchFew<Int4, Half, 1, 2, 4, 2, kHalfLine>(OneMatrix{p}, device, stream);
}

template <typename Weight, typename Half>
cudaError_t launchTyped(const LinearParams& p, void* workspace, const Device& device, cudaStream_t stream) {
  if (p.num_rows <= kFewTokens) return launchFew<Half>(p, device, stream, Weight{});
  return withManyShape(p, [&](auto shape, const ManyPlan& plan) {
    return launchMany<Weight, Half, decltype(shape)>(p, plan, workspace, device, stream);
  });
}

template <typename Half>
cudaError_t launchTyped(const LinearParams& p, void* workspace, const Device& device, cudaStream_t stream) {
  return withWeight<Half>(
      p.weight_type, [&](auto weight) { return launchTyped<decltype(weight), Half>(p, workspace, device, stream); });
}

}  // namespace
}  // namespace linear

using namespace linear;

size_t linearWorkspaceBytes(const LinearParams& params) {
  if (params.num_rows <= kFewTokens || params.num_inputs < 1 || params.num_outputs < 1) return 0;
  return withManyShape(params, [&](auto, const ManyPlan& plan) {
    return plan.grid.z > 1 ? sizeof(float) * plan.grid.z * params.num_rows * params.num_outputs : size_t{0};
  });
}

const char* linearProblem(const LinearParams& p) {
  if (p.num_rows < 1 || p.num_rows > kMaxTokens) {
    return explain("num_rows: received %d, expected 1 .. %d", p.num_rows, kMaxTokens);
  }
  if (const char* problem = weightProblem(p)) return problem;
  if (const char* problem = dtypeProblem(p.dtype)) return problem;
  const size_t rows = p.num_rows, inputs = p.num_inputs, outputs = p.num_outputs;
  const WeightBytes bytes = weightBytes(p);
  return outputProblem({"y", p.y, rows * outputs * 2},
                       {{"x", p.x, rows * inputs * 2},
                        {"weight", p.weight, bytes.weight},
                        {"scale", p.scale, bytes.scale, !bytes.scale},
                        {"block_scale", p.block_scale, bytes.block_scale, !bytes.block_scale},
                        {"zero_points", p.zero_points, bytes.zero_points, true},
                        {"bias", p.bias, outputs * 2, true}});
}

cudaError_t launchLinear(const LinearParams& params, void* workspace, cudaStream_t stream) {
  if (linearProblem(params)) return cudaErrorInvalidValue;
  if (linearWorkspaceBytes(params) && (!workspace || reinterpret_cast<size_t>(workspace) % 16)) {
    return cudaErrorInvalidValue;
  }
  Device device;
  const cudaError_t error = describeDevice(device);
  if (error != cudaSuccess) return error;
  return params.dtype == DType::kFloat16 ? launchTyped<__half>(params, workspace, device, stream)
                                         : launchTyped<__nv_bfloat16>(params, workspace, device, stream);
}

}  // namespace sinkexport
