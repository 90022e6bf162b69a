#include "text/byte_names.h"

#include "text/utf8.h"

namespace sinkrt {

ByteNames::ByteNames() {
  byte_.fill(-1);
  uint32_t other = 256;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    code_[b] = printable ? b : other++;
    byte_[code_[b]] = static_cast<int16_t>(b);
  }
}

const ByteNames& ByteNames::get() {
  static const ByteNames names;
  return names;
}

std::optional<std::string> ByteNames::bytes(std::string_view text) const {
  std::string out;
  while (!text.empty()) {
    const Utf8Step step = nextUtf8(text);
    if (step.code >= byte_.size() || byte_[step.code] < 0) return std::nullopt;
    out += static_cast<char>(byte_[step.code]);
    text.remove_prefix(step.size);
  }
  return out;
}

void ByteNames::appendBytes(std::string_view text, std::string& out) const {
  const size_t before = out.size();
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Step step = nextUtf8(rest);
    if (step.code >= byte_.size() || byte_[step.code] < 0) {
      out.resize(before);
      out.append(text);
      return;
    }
    out += static_cast<char>(byte_[step.code]);
    rest.remove_prefix(step.size);
  }
}

std::string ByteNames::written(std::string_view bytes) const {
  std::string out;
  out.reserve(2 * bytes.size());
  for (const char c : bytes) appendUtf8(out, code_[static_cast<uint8_t>(c)]);
  return out;
}

}  // namespace sinkrt
