// Rows of an INT4 table: an embedding whose table may also be the output projection's weights.
#pragma once

#include <cstdint>

#include "types.h"

namespace sinkexport {

// All pointers are device pointers, 16-byte aligned; the table, its scales and zero points lie as linear.h says of
// weights. "half" is the type that `dtype` says.
struct Int4RowsParams {
  int num_ids = 0;     // n
  int num_rows = 0;    // V
  int row_length = 0;  // K, a multiple of 8
  int block_size = 0;  // 32, 64 or 128
  DType dtype = DType::kFloat16;
  const int32_t* ids = nullptr;  // [n], 0 .. V - 1; others give the nearest row
  const void* table = nullptr;
  const void* block_scale = nullptr;
  const uint8_t* zero_points = nullptr;  // null: 8 everywhere
  void* out = nullptr;                   // half [n, K]: (q - zero) * scale of row id
};

// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* int4RowsProblem(const Int4RowsParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if int4RowsProblem says so.
cudaError_t launchInt4Rows(const Int4RowsParams& params, cudaStream_t stream);

}  // namespace sinkexport
