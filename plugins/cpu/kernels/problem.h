// Words for what is wrong with a struct of parameters.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace sinkexport::cpu {

// The text lives until this thread asks again.
__attribute__((format(printf, 1, 2))) inline const char* explain(const char* format, ...) {
  thread_local char text[240];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return text;
}

}  // namespace sinkexport::cpu
