#include "rms_norm.cuh"

#include <cmath>

#include "problem.h"

namespace sinkexport {
namespace {

using namespace rms_norm;

template <typename Half, typename Weight>
cudaError_t launchTyped(const RmsNormParams& p, cudaStream_t stream) {
  bool overlaps = false;
  const cudaError_t error = findOverlap(overlaps);
  if (error != cudaSuccess) return error;
  const Block block = blockOf(p);
  return launchOverlapping(kernelOf<Half, Weight>(block), dim3(gridOf(p, block)), dim3(block.threads, block.rows), 0,
                           overlaps, stream, p);
}

template <typename Half>
cudaError_t launchHalf(const RmsNormParams& p, cudaStream_t stream) {
  return p.float_weight ? launchTyped<Half, float>(p, stream) : launchTyped<Half, Half>(p, stream);
}

}  // namespace

const char* rmsNormProblem(const RmsNormParams& p) {
  if (p.num_rows < 1) return explain("num_rows: received %d, expected at least 1", p.num_rows);
  if (p.row_length < kHalvesOfPiece || p.row_length > kMostRowLength || p.row_length % kHalvesOfPiece != 0) {
    return explain("row_length: received %d, expected a multiple of %d in %d .. %d", p.row_length, kHalvesOfPiece,
                   kHalvesOfPiece, kMostRowLength);
  }
  if (const char* problem = dtypeProblem(p.dtype)) return problem;
  if (!(p.epsilon > 0.0f) || !std::isfinite(p.epsilon)) {
    return explain("epsilon: received %g, expected a finite number > 0", static_cast<double>(p.epsilon));
  }
  if ((p.residual == nullptr) != (p.sum == nullptr)) {
    return "residual, sum: received one of them, expected both or neither";
  }
  return pointerProblem(
      {{"x", p.x}, {"weight", p.weight}, {"y", p.y}, {"residual", p.residual, true}, {"sum", p.sum, true}});
}

cudaError_t launchRmsNorm(const RmsNormParams& p, cudaStream_t stream) {
  if (rmsNormProblem(p) != nullptr) return cudaErrorInvalidValue;
  return p.dtype == DType::kFloat16 ? launchHalf<__half>(p, stream) : launchHalf<__nv_bfloat16>(p, stream);
}

}  // namespace sinkexport
