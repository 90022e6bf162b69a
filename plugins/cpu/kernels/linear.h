// Matmuls by constant matrices, y = output_norm(activation(norm(x) . W^T + bias) * multiplier) + residual, with packed
// weights that are read as they lie in a bundle; by matrices chosen at run time (MoE); and rows of a packed table.
//
// Weights are tiles of 16 outputs, the last one padded with rows of zeros (K is padded with zeros too):
//
//   float32   [tiles][K][16] float
//   bfloat16  [tiles][K/2][16][2]          K padded to a multiple of 2
//   int8      [tiles][K/4][16][4]          of the block; per output: of 4. Values -128 .. 127
//   int4      [tiles][K/8][16][4] uint8    of the block. Low nibble: input 8i + j, high: 8i + 4 + j. Values 0 .. 15
//   scales    [tiles][blocks][16]          float32 or float16; weight = scale * (value - zero)
//   zeros     [tiles][blocks][16] uint8    0 .. 15; without them 8 for int4, 0 for int8
//
// gated: W has 2N rows and tiles alternate, gate 0, up 0, gate 1, up 1, ..; experts: a leading dimension [E].
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace sinkexport::cpu {

class Reads;

enum class WeightType : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };
enum class ScaleType : int { kFloat32 = 0, kFloat16 = 1 };
enum class Activation : int { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu2 = 4, kClampedSwiglu = 5 };

// Pointers are dense and row-major; weight and scale 64-byte aligned, x and y as floats are. y may be residual's
// memory where nothing is normalised after the matmul; otherwise it has memory of its own.
struct LinearParams {
  int64_t num_rows = 0;     // M, rows of y
  int64_t num_inputs = 0;   // K
  int64_t num_outputs = 0;  // N, columns of y
  WeightType weight_type = WeightType::kFloat32;
  int block_size = 0;  // inputs that share a scale: int8 0 (all of them), 32, 64 or 128; int4 32, 64 or 128; else 0
  ScaleType scale_type = ScaleType::kFloat32;
  Activation activation = Activation::kNone;
  bool is_gated = false;  // y = activation(x . gate^T) * (x . up^T)
  // kClampedSwiglu, gated (gpt-oss): g sigmoid(1.702 g) (u + 1) of g = min(gate, limit), u = up within -limit .. limit
  float activation_limit = 0.0f;
  bool is_layer_norm = false;  // the norm of x takes the mean off first: (x - mean) / sqrt(variance + epsilon)
  float norm_epsilon = 0.0f;   // of norm_weight
  float multiplier = 1.0f;     // on what the activation gives
  float output_norm_epsilon = 0.0f;

  const float* x = nullptr;             // [M, K]; with experts [num_x_rows, K]
  const void* weight = nullptr;         // packed, as above
  const void* scale = nullptr;          // null with float32 and bfloat16
  const uint8_t* zero_point = nullptr;  // int4 only; null: symmetric
  const float* norm_weight = nullptr;   // [K]: x is x / sqrt(mean(x^2) + norm_epsilon) * norm_weight; null: no norm
  const float* norm_bias = nullptr;     // [K], of a layer norm: added after the weight; null: none
  const float* bias = nullptr;          // [N], gated [2N], all gates first; with experts [E, ..]; null: none
  const float* output_norm_weight = nullptr;  // [N], of an RMS norm of each row before `residual`; null: none
  const float* residual = nullptr;            // [M, N], added last; null: none
  float* y = nullptr;                         // [M, N]

  int num_experts = 0;             // E; 0: one matrix for all rows
  int64_t num_x_rows = 0;          // with experts, divides M: row m of y is of row m / (M / num_x_rows) of x
  const int64_t* picks = nullptr;  // [M], the matrix of each row of y, 0 .. E - 1; what is beyond gives the nearest
  // [M]: y [num_sums, N] is the weighted sum of M / num_sums rows each, then `residual` [num_sums, N] is added
  const float* pick_weights = nullptr;
  int64_t num_sums = 0;  // divides M; 0 without pick_weights
};

// Rows `ids` of a packed table of N rows: y[i] = W[ids[i]].
struct RowsParams {
  int64_t num_ids = 0;
  int64_t num_rows = 0;    // N of the table; an id beyond it gives the nearest row
  int64_t row_length = 0;  // K
  WeightType weight_type = WeightType::kFloat32;
  int block_size = 0;
  ScaleType scale_type = ScaleType::kFloat32;
  const int64_t* ids = nullptr;
  const void* weight = nullptr;
  const void* scale = nullptr;
  const uint8_t* zero_point = nullptr;
  float* y = nullptr;  // [num_ids, K]
};

// Bytes of one packed matrix (of one expert): weight, scales, zero points.
struct PackedBytes {
  size_t weight;
  size_t scale;
  size_t zero_point;
};
PackedBytes packedBytes(WeightType weight_type, int64_t num_inputs, int64_t weight_rows, int block_size,
                        ScaleType scale_type);

// Null if it can be run, else one line that says what is wrong and what is expected. With `shapes_only` pointers are
// not looked at: for a check before any memory exists.
const char* linearProblem(const LinearParams& params, bool shapes_only = false);
const char* rowsProblem(const RowsParams& params, bool shapes_only = false);

// The kernels of one instruction set; look them up once. A row of y has the same bits whatever M and the number of
// threads are. Nothing is allocated but in `scratch`, once.
using LinearFunction = void (*)(const LinearParams& params, const Parallel& parallel, Scratch& scratch);
LinearFunction linearFor(Isa isa);
void runRows(const RowsParams& params, const Parallel& parallel);

// From so many rows on a call has more tasks than threads, for threads that are held up.
constexpr int64_t kRowsOfFewTasks = 64;

// What each of `threads` workers reads of the matrix of a call with fewer rows; with experts nothing is known before.
void linearReads(const LinearParams& params, int threads, Reads& reads);

}  // namespace sinkexport::cpu
