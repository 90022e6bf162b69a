// The regular expressions of tokenizers: alternatives, classes with \p{..} and classes inside, groups with (?i:..),
// lookahead, '$', greedy quantifiers, possessive ones of single characters. What Oniguruma (Ruby's syntax) finds, this
// finds; anything else is refused when compiled, and so is what may match nothing at all.
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

  // Length in bytes, at least 1, of the match in `text` that begins at `start`; -1: there is none. Text is valid UTF-8.
  int64_t match(std::string_view text, size_t start) const;

  // A set of characters.
  struct Set {
    bool negated = false;
    bool folded = false;  // (?i:..): letters of either case
    bool space = false, not_space = false;
    bool word = false, not_word = false;              // \w by itself
    bool class_word = false, class_not_word = false;  // \w in a class, which has fewer
    uint32_t categories = 0;
    std::vector<std::pair<uint32_t, uint32_t>> ranges;
    std::vector<Set> inner;  // classes inside a class

    bool has(uint32_t code) const;
    void addAscii();
    bool ascii[128] = {};  // `has`, looked up

   private:
    bool plainlyHas(uint32_t code) const;
  };

  struct Item;
  using Sequence = std::vector<Item>;
  using Alternatives = std::vector<Sequence>;
  enum class Kind : uint8_t { kSet, kGroup, kAhead, kNotAhead, kLineEnd };
  struct Item {
    Kind kind = Kind::kSet;
    uint32_t least = 1, most = 1;  // times
    bool possessive = false;       // never fewer than there are
    bool fixed = false;            // a group of a fixed number of characters, repeated without end
    Set set;
    Alternatives inner;
  };

 private:
  Alternatives alternatives_;
};

}  // namespace sinkrt
