// The regular expressions of tokenizers: alternatives, classes with \p{..}, groups with (?i:..), lookahead, greedy
// quantifiers. What a backtracking engine such as Oniguruma finds, this finds; anything else is refused when compiled.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sinkrt {

// A pattern that uses what is not supported.
class PatternError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Pattern {
 public:
  // Throws PatternError.
  explicit Pattern(std::string_view source);

  // Length in bytes of the match at the beginning of `text` at `start`; -1: there is none. Text is valid UTF-8.
  int64_t match(std::string_view text, size_t start) const;

  // A set of characters.
  struct Set {
    bool negated = false;
    bool folded = false;  // (?i:..): letters of either case
    bool space = false, not_space = false;
    uint32_t categories = 0;
    std::vector<std::pair<uint32_t, uint32_t>> ranges;

    bool has(uint32_t code) const;
    void addAscii();
    bool ascii[128] = {};  // `has`, looked up

   private:
    bool plainlyHas(uint32_t code) const;
  };

  struct Item;
  using Sequence = std::vector<Item>;
  using Alternatives = std::vector<Sequence>;
  enum class Kind : uint8_t { kSet, kGroup, kAhead, kNotAhead };
  struct Item {
    Kind kind = Kind::kSet;
    uint32_t least = 1, most = 1;  // times
    Set set;
    Alternatives inner;
  };

 private:
  Alternatives alternatives_;
};

}  // namespace sinkrt
