// UTF-8, strictly: no overlong forms, no surrogates, nothing past U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace sinkrt {

// One step of a decoder. valid: `size` bytes are the character `code`. Otherwise `size` bytes are the longest beginning
// of a character that nothing here completes: what one U+FFFD stands for (Unicode 16, 3.9.6). incomplete: the text
// ended.
struct Utf8Step {
  bool valid;
  bool incomplete;
  size_t size;
  uint32_t code;
};

inline Utf8Step nextUtf8(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {true, false, 1, first};
  size_t size = 0;
  uint8_t low = 0x80, high = 0xbf;  // what the second byte may be
  if (first >= 0xc2 && first <= 0xdf) {
    size = 2;
  } else if (first >= 0xe0 && first <= 0xef) {
    size = 3;
    if (first == 0xe0) low = 0xa0;
    if (first == 0xed) high = 0x9f;
  } else if (first >= 0xf0 && first <= 0xf4) {
    size = 4;
    if (first == 0xf0) low = 0x90;
    if (first == 0xf4) high = 0x8f;
  } else {
    return {false, false, 1, 0};
  }
  uint32_t code = first & (0xffu >> (size + 1));
  for (size_t i = 1; i < size; ++i) {
    if (i == text.size()) return {false, true, i, 0};
    if (byte(i) < low || byte(i) > high) return {false, false, i, 0};
    code = code << 6 | (byte(i) & 0x3fu);
    low = 0x80;
    high = 0xbf;
  }
  return {true, false, size, code};
}

inline void appendUtf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    out += static_cast<char>(0xf0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3f));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    out += static_cast<char>(0x80 | (code & 0x3f));
  }
}

inline bool isUtf8(std::string_view text) {
  while (!text.empty()) {
    const Utf8Step step = nextUtf8(text);
    if (!step.valid) return false;
    text.remove_prefix(step.size);
  }
  return true;
}

// Appends `bytes` with U+FFFD for what is no UTF-8.
inline void appendLossy(std::string& out, std::string_view bytes) {
  while (!bytes.empty()) {
    const Utf8Step step = nextUtf8(bytes);
    if (step.valid) {
      out.append(bytes.substr(0, step.size));
    } else {
      out.append("\xef\xbf\xbd");
    }
    bytes.remove_prefix(step.size);
  }
}

}  // namespace sinkrt
