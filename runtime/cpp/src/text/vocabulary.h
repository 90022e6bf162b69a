// Tokens by id and by text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/tokenizer_file.h"

namespace sinkrt {

class Vocabulary {
 public:
  // One past the largest id.
  size_t end() const { return texts_.size(); }
  bool has(int64_t id) const { return id >= 0 && static_cast<size_t>(id) < end() && known_[static_cast<size_t>(id)]; }
  const std::string& text(int64_t id) const { return texts_[static_cast<size_t>(id)]; }
  // Id of a token of the model; -1: there is none.
  int64_t id(std::string_view text) const {
    const auto found = ids_.find(std::string(text));
    return found == ids_.end() ? -1 : found->second;
  }

  // Adds a token of the model.
  void put(int64_t id, const std::string& text) {
    setText(id, text);
    ids_[text] = id;
  }
  // Gives an id another text, which is not found by it.
  void setText(int64_t id, const std::string& text) {
    const auto index = static_cast<size_t>(id);
    if (index >= texts_.size()) {
      texts_.resize(index + 1);
      known_.resize(index + 1);
    }
    texts_[index] = text;
    known_[index] = true;
  }

  // The id of "<0x00>" .. "<0xFF>"; -1: there is none.
  int64_t byteId(uint8_t byte) const {
    static const char* const kHex = "0123456789ABCDEF";
    return id(std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">");
  }

 private:
  std::vector<std::string> texts_;
  std::vector<bool> known_;
  std::unordered_map<std::string, int64_t> ids_;
};

}  // namespace sinkrt
