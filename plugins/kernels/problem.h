// Words for what is wrong with a struct of parameters, on the host.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "types.h"

namespace sinkexport {

// The text lives until this thread asks again.
__attribute__((format(printf, 1, 2))) inline const char* explain(const char* format, ...) {
  thread_local char text[200];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return text;
}

inline const char* dtypeProblem(DType dtype) {
  if (dtype == DType::kFloat16 || dtype == DType::kBFloat16) return nullptr;
  return explain("dtype: received %d, expected 0 (float16) or 1 (bfloat16)", static_cast<int>(dtype));
}

struct NamedPointer {
  const char* name;
  const void* address;
  bool is_optional = false;
};

inline const char* pointerProblem(std::initializer_list<NamedPointer> pointers) {
  for (const NamedPointer& one : pointers) {
    if (one.address == nullptr && !one.is_optional) {
      return explain("%s: received null, expected a device pointer", one.name);
    }
    if (reinterpret_cast<uintptr_t>(one.address) % 16 != 0) {
      return explain("%s: received %p, expected a device pointer that is a multiple of 16", one.name, one.address);
    }
  }
  return nullptr;
}

// Memory of an input or an output.
struct Range {
  const char* name;
  const void* data;
  size_t bytes;
  bool is_optional = false;
};

// What is wrong with an output that must have memory of its own, or with inputs.
inline const char* outputProblem(const Range& output, std::initializer_list<Range> inputs) {
  const auto address = [](const Range& range) { return reinterpret_cast<uintptr_t>(range.data); };
  if (const char* problem = pointerProblem({{output.name, output.data}})) return problem;
  for (const Range& range : inputs) {
    if (const char* problem = pointerProblem({{range.name, range.data, range.is_optional}})) return problem;
    if (range.data && address(range) < address(output) + output.bytes &&
        address(output) < address(range) + range.bytes) {
      return explain("%s: overlaps %s, expected memory of its own", output.name, range.name);
    }
  }
  return nullptr;
}

}  // namespace sinkexport
