// Bytes as byte-level vocabularies write them: printable ones as themselves, the others from U+0100 on.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace sinkrt {

class ByteNames {
 public:
  static const ByteNames& get();

  // The bytes that a vocabulary's text stands for; nothing if it is not written so.
  std::optional<std::string> bytes(std::string_view text) const;
  // Appends them, or the text itself if it is not written so.
  void appendBytes(std::string_view text, std::string& out) const;
  // A text as a byte-level vocabulary writes its bytes.
  std::string written(std::string_view bytes) const;

 private:
  ByteNames();

  std::array<uint32_t, 256> code_{};
  std::array<int16_t, 512> byte_{};  // of a code; -1: none
};

}  // namespace sinkrt
