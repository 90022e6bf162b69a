// Matmuls by constant matrices, y = x . W^T + bias: W in INT8 with a scale an output (W8A16), in INT4 with a scale for
// each block of inputs (W4A16), or of x's own type. They take over what stands beside them in a decoder layer: the RMS
// norm of x, the addition of a residual stream, the gate of a feed-forward block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gated_activation.h"
#include "types.h"

namespace sinkexport {

enum class WeightType : int {
  kInt8 = 0,  // y = x . W^T * scale + bias
  kHalf = 1,  // of `dtype`; y = x . W^T + bias
  kInt4 = 2,  // 0 .. 15 in tiles; y = sum over blocks of (x . (q - zero)^T * scale) + bias
};

// How INT4 weights lie in memory, each array dense. Tiles are of 16 outputs x 64 inputs: N is padded to a multiple of
// 16 and K to one of 64, with anything. Blocks of 32, 64 or 128 inputs share a scale and a zero point: G = ceil(K /
// block_size) of them.
//   weight        [ceil(N / 16), ceil(K / 64), 512] bytes. Byte ((4 * g + t) * 4 + s) * 4 + j of a tile, g 0 .. 7, t, s
//                 and j 0 .. 3, has output g in its low nibble and output g + 8 in its high one, both of input
//                 32 * (s / 2) + 8 * t + 4 * (s % 2) + {0, 2, 1, 3}[j]: what lane 4 g + t multiplies is 16 bytes.
//   block_scale   float16 [ceil(N / 16), G, 16], finite, of outputs 0, 8, 1, 9, .., 7, 15
//   zero_points   uint8, the same shape and order, 0 .. 15
// Matrices of experts follow each other, each padded.
constexpr int kInt4TileOutputs = 16, kInt4TileInputs = 64, kInt4TileBytes = 512;

// All pointers are device pointers, dense and row-major, 16-byte aligned. "half" is the type that `dtype` says.
struct LinearParams {
  int num_rows = 0;     // M: tokens; 1 .. 16 read the weights once at memory speed, more (prefill) use tensor cores
  int num_inputs = 0;   // K, a multiple of 16; with half and INT4 weights of 8
  int num_outputs = 0;  // N, rows of the weight
  DType dtype = DType::kFloat16;
  const void* x = nullptr;       // half [M, K]
  const void* weight = nullptr;  // int8 or half [N, K], or INT4 as above, as weight_type says
  const float* scale = nullptr;  // [N], > 0; null but with INT8 weights
  const void* bias = nullptr;    // half [N]; null: none
  void* y = nullptr;             // half [M, N], gated: [M, N / 2]; sums are float32, and what follows, rounded once

  // Nothing that was put into the stream before this and may not have ended by now writes `weight`, its scales and zero
  // points, `bias` or `norm_weight`, as is so for a model's weights. Where a kernel can start before the one ahead of
  // it ends (compute capability 9.0 and above), its first weights are then read early; all else waits.
  bool constant_weight = false;
  WeightType weight_type = WeightType::kInt8;

  int block_size = 0;                    // 32, 64 or 128 with INT4 weights, else 0
  const void* block_scale = nullptr;     // of INT4 weights, else null
  const uint8_t* zero_points = nullptr;  // of INT4 weights; null: 8 everywhere

  // A norm of x before the matmul, rounded as rms_norm.h says: x / sqrt(mean(x^2) + norm_epsilon) * norm_weight.
  const void* norm_weight = nullptr;  // half or float32 [K]; null: none
  bool float_norm_weight = false;     // norm_weight is float32
  float norm_epsilon = 0.0f;          // > 0 with a norm

  const void* residual = nullptr;  // half [M, N], added to the sums; null: none

  // Rows of the weight, and what goes with them, are gate | up, N / 2 each, a multiple of 16: y = activation(gate) *
  // up.
  bool is_gated = false;  // not with a residual
  Activation activation = Activation::kSilu;
};

size_t linearWorkspaceBytes(const LinearParams& params);
// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* linearProblem(const LinearParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if linearProblem says so.
cudaError_t launchLinear(const LinearParams& params, void* workspace, cudaStream_t stream);

}  // namespace sinkexport
