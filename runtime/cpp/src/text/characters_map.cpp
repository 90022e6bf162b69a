#include "text/characters_map.h"

#include "text/unicode.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

// Clusters of more bytes are taken character by character.
constexpr size_t kMostBytes = 5;

int base64Digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

// Bytes of a text in base64, with its padding; false: it is none.
bool decoded(std::string_view text, std::string& out) {
  if (text.size() % 4 != 0) return false;
  size_t padding = 0;
  while (padding < 2 && !text.empty() && text.back() == '=') {
    text.remove_suffix(1);
    ++padding;
  }
  uint32_t bits = 0, count = 0;
  for (const char c : text) {
    const int digit = base64Digit(c);
    if (digit < 0) return false;
    bits = bits << 6 | static_cast<uint32_t>(digit);
    count += 6;
    if (count >= 8) {
      count -= 8;
      out += static_cast<char>(bits >> count & 0xff);
    }
  }
  return (bits & ((1u << count) - 1)) == 0;
}

// A unit of the trie: a label, whether a text ends here, and where those that follow are.
uint32_t label(uint32_t unit) {
  return unit & (1u << 31 | 0xff);
}
bool hasLeaf(uint32_t unit) {
  return (unit >> 8 & 1) == 1;
}
size_t offset(uint32_t unit) {
  return static_cast<size_t>(unit >> 10) << ((unit & 1u << 9) >> 6);
}

}  // namespace

CharactersMap CharactersMap::read(const TokenizerFile& file, const std::string& base64) {
  std::string bytes;
  const bool fine = decoded(base64, bytes);
  size_t size = 0;  // of the trie, in bytes
  for (size_t i = 0; fine && bytes.size() >= 4 && i < 4; ++i) size |= size_t{static_cast<uint8_t>(bytes[i])} << 8 * i;
  if (!fine || size < 4 || size % 4 != 0 || size > bytes.size() - 4) {
    file.refuse("a precompiled_charsmap that is none", "a trie and its texts in base64");
  }
  CharactersMap map;
  for (size_t at = 4; at < 4 + size; at += 4) {
    uint32_t unit = 0;
    for (size_t i = 0; i < 4; ++i) unit |= uint32_t{static_cast<uint8_t>(bytes[at + i])} << 8 * i;
    map.units_.push_back(unit);
  }
  map.texts_ = bytes.substr(4 + size);
  if (!isUtf8(map.texts_)) file.refuse("a precompiled_charsmap whose texts are not UTF-8", "UTF-8");
  return map;
}

bool CharactersMap::replaced(std::string_view text, std::string& out) const {
  size_t node = offset(units_[0]);
  for (const char c : text) {
    const auto byte = static_cast<uint8_t>(c);
    node ^= byte;
    if (byte == 0 || node >= units_.size() || label(units_[node]) != byte) return false;
    const uint32_t unit = units_[node];
    node ^= offset(unit);
    if (!hasLeaf(unit)) continue;
    if (node >= units_.size()) return false;
    const size_t start = units_[node] & ~(1u << 31);
    if (start > texts_.size()) return false;
    const size_t end = texts_.find('\0', start);
    out.append(texts_, start, end == std::string::npos ? end : end - start);
    return true;
  }
  return false;
}

void CharactersMap::apply(std::string_view text, std::string& out) const {
  while (!text.empty()) {
    const size_t size = clusterSize(text);
    const std::string_view cluster = text.substr(0, size);
    text.remove_prefix(size);
    // The shortest beginning that the table has stands for the whole cluster: so it is in the library.
    if (size <= kMostBytes && replaced(cluster, out)) continue;
    for (std::string_view rest = cluster; !rest.empty();) {
      const std::string_view character = rest.substr(0, nextUtf8(rest).size);
      if (!replaced(character, out)) out.append(character);
      rest.remove_prefix(character.size());
    }
  }
}

}  // namespace sinkrt
