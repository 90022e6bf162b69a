// Rows of an INT8 table: an embedding whose table may also be the output projection's weights.
#pragma once

#include <cstdint>

#include "types.h"

namespace sinkexport {

// All pointers are device pointers, dense and row-major, 16-byte aligned. "half" is the type that `dtype` says.
struct Int8RowsParams {
  int num_ids = 0;     // n
  int num_rows = 0;    // V
  int row_length = 0;  // K, a multiple of 16
  DType dtype = DType::kFloat16;
  const int32_t* ids = nullptr;   // [n], 0 .. V - 1; others give the nearest row
  const int8_t* table = nullptr;  // [V, K]
  const float* scale = nullptr;   // [V], > 0
  void* out = nullptr;            // half [n, K]: table[id] * scale[id]
};

// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* int8RowsProblem(const Int8RowsParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if int8RowsProblem says so.
cudaError_t launchInt8Rows(const Int8RowsParams& params, cudaStream_t stream);

}  // namespace sinkexport
