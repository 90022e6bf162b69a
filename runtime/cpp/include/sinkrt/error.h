// Errors that a user can cause, each reported in one line: what, received, expected, fix. Twin of
// runtime/sinkrt/errors.py.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace sinkrt {

// The values are those of `sinkrt_status` in sinkrt.h.
enum class Code {
  kUsage = 1,        // bad input: an argument, an id, a shape
  kBundle = 2,       // a bundle that is missing, corrupt, newer than this runtime or inconsistent
  kState = 3,        // a saved state that is truncated, of another model or of another version
  kBackend = 4,      // a backend that is not there or cannot run the bundle
  kOutOfMemory = 5,  // the host or the device has too little
  kInternal = 6,     // a fault of this library
};

// The only type that this library throws on purpose (std::bad_alloc passes through).
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Code code() const { return code_; }

 private:
  Code code_;
};

// The text with escapes in place of control characters and of bytes that are no UTF-8: names come from
// untrusted files, and terminals obey control characters.
std::string printable(std::string_view text);

// One line of what, received, expected and fix, e.g. "window size: received 0, expected >= 1; pass --window".
// Printable.
std::string problem(const std::string& what, const std::string& received, const std::string& expected,
                    const std::string& fix);

}  // namespace sinkrt
