// Rules for the values of a manifest, as sinkrt.contract.rules has them. All throw Error(kBundle) in one line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace sinkrt {

[[noreturn]] void refuse(const std::string& what, const std::string& received, const std::string& expected,
                         const std::string& fix = "export the model again");

void require(bool ok, const std::string& what, const std::string& received, const std::string& expected);

void atLeast(const char* what, int64_t value, int64_t least, const char* unit = "");
// A relative path inside the bundle.
void pathInside(const std::string& what, const std::string& path);
// 64 hex digits.
void digest(const char* what, const std::string& text);

template <size_t N>
void oneOf(const char* what, const std::string& value, const char* const (&allowed)[N]) {
  std::string all;
  for (const char* each : allowed) {
    if (value == each) return;
    all += (all.empty() ? "" : " | ") + std::string(each);
  }
  refuse(what, value, all);
}

// Where there is a value.
inline void atLeast(const char* what, const std::optional<int64_t>& value, int64_t least) {
  if (value) atLeast(what, *value, least);
}
inline void pathInside(const std::string& what, const std::optional<std::string>& path) {
  if (path) pathInside(what, *path);
}

}  // namespace sinkrt
