// Words for what is wrong with a struct of parameters, on the host.
#pragma once

#include <cstdarg>
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

}  // namespace sinkexport
