// What a part looks for: a text, or a regular expression.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "text/pattern.h"
#include "text/tokenizer_file.h"

namespace sinkrt {

class Finder {
 public:
  explicit Finder(std::string text) : text_(std::move(text)) {}
  explicit Finder(Pattern pattern) : pattern_(std::move(pattern)) {}
  // A part's {"String": ..} or {"Regex": ..}. Throws Error(kBundle).
  static Finder read(const TokenizerFile& file, const Json& pattern);

  // Whether what is found is always the same single character.
  bool isCharacter() const;
  // Beginning and end of the first match that begins at `from` or later. Text is valid UTF-8.
  std::optional<std::pair<size_t, size_t>> find(std::string_view text, size_t from) const;
  // Appends `text` with every match replaced.
  void replace(std::string_view text, std::string_view content, std::string& out) const;

 private:
  std::string text_;
  std::optional<Pattern> pattern_;
};

}  // namespace sinkrt
