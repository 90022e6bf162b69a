#include "gated_activation.cuh"

#include "problem.h"

namespace sinkexport {
namespace {

using namespace gated_activation;

constexpr int kMaxWidth = 1 << 21;

template <typename Half>
cudaError_t launchHalf(const GatedActivationParams& p, cudaStream_t stream) {
  bool overlaps = false;
  const cudaError_t error = findOverlap(overlaps);
  if (error != cudaSuccess) return error;
  return launchOverlapping(kernelOf<Half>(p.activation), dim3(p.num_rows, blocksOf(p)), dim3(kThreads), 0, overlaps,
                           stream, p);
}

}  // namespace

const char* gatedActivationProblem(const GatedActivationParams& p) {
  if (p.num_rows < 1) return explain("num_rows: received %d, expected at least 1", p.num_rows);
  if (p.width < kHalvesOfPiece || p.width > kMaxWidth || p.width % kHalvesOfPiece != 0) {
    return explain("width: received %d, expected a multiple of %d in %d .. %d", p.width, kHalvesOfPiece, kHalvesOfPiece,
                   kMaxWidth);
  }
  if (p.row_stride < p.width || p.row_stride % kHalvesOfPiece != 0) {
    return explain("row_stride: received %d, expected a multiple of %d of at least width (%d)", p.row_stride,
                   kHalvesOfPiece, p.width);
  }
  if (const char* problem = dtypeProblem(p.dtype)) return problem;
  if (p.activation < Activation::kSilu || p.activation > Activation::kGeluTanh) {
    return explain("activation: received %d, expected 0 (silu), 1 (gelu) or 2 (gelu by tanh)",
                   static_cast<int>(p.activation));
  }
  return pointerProblem({{"gate", p.gate}, {"up", p.up}, {"out", p.out}});
}

cudaError_t launchGatedActivation(const GatedActivationParams& p, cudaStream_t stream) {
  if (gatedActivationProblem(p) != nullptr) return cudaErrorInvalidValue;
  return p.dtype == DType::kFloat16 ? launchHalf<__half>(p, stream) : launchHalf<__nv_bfloat16>(p, stream);
}

}  // namespace sinkexport
