#include "sinkrt/error.h"

#include <cstdint>
#include <cstdio>

#include "text/utf8.h"

namespace sinkrt {
namespace {

// Control characters, and those that turn or break a line: what a terminal would obey instead of showing.
bool isObeyed(uint32_t c) {
  return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x61c || c == 0x200b || c == 0x200e || c == 0x200f ||
         (c >= 0x2028 && c <= 0x202e) || (c >= 0x2060 && c <= 0x206f) || c == 0xfeff;
}

std::string escaped(uint32_t c) {
  if (c == '\n') return "\\n";
  if (c == '\r') return "\\r";
  if (c == '\t') return "\\t";
  char out[16];
  std::snprintf(out, sizeof out, c < 0x100 ? "\\x%02x" : "\\u%04x", static_cast<unsigned>(c));
  return out;
}

// Characters of a name or a value in a message, as bytes: more than the longest path.
constexpr size_t kMaxShown = 5000;

std::string cut(const std::string& text) {
  if (text.size() <= kMaxShown) return text;
  size_t size = kMaxShown;
  while (size > 0 && (static_cast<uint8_t>(text[size]) & 0xc0) == 0x80) --size;  // not inside a character
  return text.substr(0, size) + ".. (" + std::to_string(text.size()) + " bytes)";
}

}  // namespace

std::string printable(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Step step = nextUtf8(text);
    for (size_t i = 0; !step.valid && i < step.size; ++i) out += escaped(static_cast<uint8_t>(text[i]));
    if (step.valid) out += isObeyed(step.code) ? escaped(step.code) : std::string(text.substr(0, step.size));
    text.remove_prefix(step.size);
  }
  return out;
}

std::string problem(const std::string& what, const std::string& received, const std::string& expected,
                    const std::string& fix) {
  return printable(cut(what) + ": received " + cut(received) + ", expected " + expected + "; " + fix);
}

}  // namespace sinkrt
