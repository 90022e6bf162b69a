#include "int4_rows.h"

#include "halves.cuh"
#include "linear.h"
#include "problem.h"
#include "warp.cuh"

namespace sinkexport {
namespace {

constexpr int kEntries = 8;  // that a thread reads at once: two words of a lane's four

// A block for each id.
template <typename T>
__global__ void int4Rows(const Int4RowsParams p) {
  const int id = p.ids[blockIdx.x];
  const int row = id < 0 ? 0 : (id < p.num_rows ? id : p.num_rows - 1);
  const int tile = row / kInt4TileOutputs, row_of_tile = row % kInt4TileOutputs, g = row_of_tile % 8;
  const bool is_far = row_of_tile >= 8;
  const int num_steps = divideUp(p.row_length, kInt4TileInputs), num_groups = divideUp(p.row_length, p.block_size);
  const auto* const words =
      static_cast<const uint2*>(p.table) + static_cast<size_t>(tile) * num_steps * (kInt4TileBytes / sizeof(uint2));
  const auto* const scales = static_cast<const __half*>(p.block_scale);
  T* const out = static_cast<T*>(p.out) + static_cast<size_t>(blockIdx.x) * p.row_length;
  for (int i = threadIdx.x; i < p.row_length / kEntries; i += blockDim.x) {
    // Inputs 8 i ..: half `i / 4 % 2` of 64, share `i % 4` of that.
    const uint2 both = words[i / 8 * (kInt4TileBytes / sizeof(uint2)) + (g * 4 + i % 4) * 2 + i / 4 % 2];
    const size_t group = static_cast<size_t>(tile) * num_groups + i * kEntries / p.block_size;
    const size_t at = group * kInt4TileOutputs + g * 2 + is_far;
    const float scale = __half2float(scales[at]);
    const int zero = p.zero_points ? p.zero_points[at] : 8;
    alignas(16) T values[kEntries];
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      constexpr int kByteOf[4] = {0, 2, 1, 3};
      const uint32_t word = k < 4 ? both.x : both.y;
      const int q = static_cast<int>(word >> (8 * kByteOf[k % 4] + 4 * is_far)) & 15;
      values[k] = fromFloat<T>(static_cast<float>(q - zero) * scale);
    }
    reinterpret_cast<int4*>(out)[i] = *reinterpret_cast<const int4*>(values);
  }
}

}  // namespace

const char* int4RowsProblem(const Int4RowsParams& p) {
  if (p.num_ids < 1) return explain("num_ids: received %d, expected at least 1", p.num_ids);
  if (p.num_rows < 1) return explain("num_rows: received %d, expected at least 1", p.num_rows);
  if (p.row_length < kEntries || p.row_length % kEntries != 0) {
    return explain("row_length: received %d, expected a multiple of %d", p.row_length, kEntries);
  }
  if (p.block_size != 32 && p.block_size != 64 && p.block_size != 128) {
    return explain("block_size: received %d, expected 32, 64 or 128", p.block_size);
  }
  if (const char* problem = dtypeProblem(p.dtype)) return problem;
  return pointerProblem({{"ids", p.ids},
                         {"table", p.table},
                         {"block_scale", p.block_scale},
                         {"zero_points", p.zero_points, true},
                         {"out", p.out}});
}

cudaError_t launchInt4Rows(const Int4RowsParams& p, cudaStream_t stream) {
  if (int4RowsProblem(p) != nullptr) return cudaErrorInvalidValue;
  constexpr int kThreads = 128;
  if (p.dtype == DType::kFloat16) {
    int4Rows<__half><<<p.num_ids, kThreads, 0, stream>>>(p);
  } else {
    int4Rows<__nv_bfloat16><<<p.num_ids, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace sinkexport
