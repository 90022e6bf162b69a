// SentencePiece's table of what characters become ("Precompiled"): NFKC and rules of its own, as a trie in one array.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/tokenizer_file.h"

namespace sinkrt {

class CharactersMap {
 public:
  // base64: the file's text. Throws Error(kBundle).
  static CharactersMap read(const TokenizerFile& file, const std::string& base64);

  // Appends what a text becomes. Text is valid UTF-8.
  void apply(std::string_view text, std::string& out) const;

 private:
  // Whether a text begins with what the table has; appends what the shortest such beginning becomes.
  bool replaced(std::string_view text, std::string& out) const;

  std::vector<uint32_t> units_;
  std::string texts_;  // each ended by a zero
};

}  // namespace sinkrt
