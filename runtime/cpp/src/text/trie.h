// Texts by their bytes, to find which of them a text begins with.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "text/pair_table.h"

namespace sinkrt {

class Trie {
 public:
  // value >= 0. Returns whether the text is new; else its value becomes this one.
  bool put(std::string_view text, int64_t value) {
    uint32_t node = 0;
    for (const char c : text) {
      if (const uint32_t* next = edges_.find(node, static_cast<uint8_t>(c))) {
        node = *next;
      } else {
        const auto made = static_cast<uint32_t>(values_.size());
        values_.push_back(-1);
        edges_.put(node, static_cast<uint8_t>(c), made);
        node = made;
      }
    }
    const bool is_new = values_[node] < 0;
    values_[node] = value;
    return is_new;
  }

  // Calls found(length, value) for each text that `text` begins with, the shortest first.
  template <typename Found>
  void prefixes(std::string_view text, const Found& found) const {
    uint32_t node = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const uint32_t* next = edges_.find(node, static_cast<uint8_t>(text[i]));
      if (next == nullptr) return;
      node = *next;
      if (values_[node] >= 0) found(i + 1, values_[node]);
    }
  }

 private:
  PairTable<uint32_t> edges_;
  std::vector<int64_t> values_ = {-1};  // by node; -1: no text ends here
};

}  // namespace sinkrt
