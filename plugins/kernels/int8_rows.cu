#include "int8_rows.h"

#include "halves.cuh"
#include "problem.h"

namespace sinkexport {
namespace {

constexpr int kEntries = 16;  // that a thread reads at once

// A block for each id.
template <typename T>
__global__ void int8Rows(const Int8RowsParams p) {
  const int id = p.ids[blockIdx.x];
  const int row = id < 0 ? 0 : (id < p.num_rows ? id : p.num_rows - 1);
  const float scale = p.scale[row];
  const auto* from = reinterpret_cast<const int4*>(p.table + static_cast<size_t>(row) * p.row_length);
  T* to = static_cast<T*>(p.out) + static_cast<size_t>(blockIdx.x) * p.row_length;
  for (int i = threadIdx.x; i < p.row_length / kEntries; i += blockDim.x) {
    const int4 words = from[i];
    alignas(16) int8_t entries[kEntries];
    *reinterpret_cast<int4*>(entries) = words;
    alignas(16) T values[kEntries];
#pragma unroll
    for (int k = 0; k < kEntries; ++k) values[k] = fromFloat<T>(static_cast<float>(entries[k]) * scale);
    auto* target = reinterpret_cast<int4*>(to + i * kEntries);
    target[0] = reinterpret_cast<const int4*>(values)[0];
    target[1] = reinterpret_cast<const int4*>(values)[1];
  }
}

}  // namespace

const char* int8RowsProblem(const Int8RowsParams& p) {
  if (p.num_ids < 1) return explain("num_ids: received %d, expected at least 1", p.num_ids);
  if (p.num_rows < 1) return explain("num_rows: received %d, expected at least 1", p.num_rows);
  if (p.row_length < kEntries || p.row_length % kEntries != 0) {
    return explain("row_length: received %d, expected a multiple of %d", p.row_length, kEntries);
  }
  if (const char* problem = dtypeProblem(p.dtype)) return problem;
  return pointerProblem({{"ids", p.ids}, {"table", p.table}, {"scale", p.scale}, {"out", p.out}});
}

cudaError_t launchInt8Rows(const Int8RowsParams& p, cudaStream_t stream) {
  if (int8RowsProblem(p) != nullptr) return cudaErrorInvalidValue;
  constexpr int kThreads = 64;
  if (p.dtype == DType::kFloat16) {
    int8Rows<__half><<<p.num_ids, kThreads, 0, stream>>>(p);
  } else {
    int8Rows<__nv_bfloat16><<<p.num_ids, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace sinkexport
