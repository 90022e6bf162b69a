// Tokens whose text is looked for before anything else.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "text/normalizer.h"
#include "text/trie.h"
#include "text/vocabulary.h"

namespace sinkrt {

class AddedTokens {
 public:
  // The "added_tokens" of a file; the vocabulary gets the text that a decoder sees. model_size: tokens
  // that the model has by itself. Throws Error(kBundle).
  void read(const TokenizerFile& file, const Json& part, const Normalizer& normalizer, size_t model_size,
            Vocabulary& vocabulary);

  // Whether an id is of a special token.
  bool isSpecial(int64_t id) const { return special_ids_.count(id) > 0; }
  // Whether a decoder leaves out tokens of this text.
  bool isSpecial(const std::string& text) const { return special_texts_.count(text) > 0; }
  // The id of a token by its own text; -1: none of these.
  int64_t id(const std::string& content) const {
    const auto found = ids_.find(content);
    return found == ids_.end() ? -1 : found->second;
  }
  bool hasNormalized() const { return !normalized_.isEmpty(); }

  // Cuts a text at the tokens that are found before, or after, it is normalized: calls on_token(id) and
  // on_text(text, start) in order.
  template <typename OnToken, typename OnText>
  void cut(std::string_view text, bool normalized, const OnToken& on_token, const OnText& on_text) const {
    const Set& set = normalized ? normalized_ : raw_;
    size_t start = 0;  // of the text that is not cut yet
    for (size_t at = 0; at < text.size();) {
      const Token* found = set.find(text, at);
      if (found == nullptr) break;
      Place place = set.place(text, start, at, *found);
      if (place.wanted) {
        if (place.first > start) on_text(text.substr(start, place.first - start), start);
        if (place.first < place.last) on_token(found->id);  // not if the token before took all of it
        start = place.last;  // the search goes on behind the token itself, not behind the space that it took
      }
    }
    if (start != text.size()) on_text(text.substr(start), start);
  }

 private:
  struct Token {
    int64_t id;
    size_t size;  // bytes of what is looked for
    bool lstrip, rstrip, single_word;
  };
  struct Place {
    bool wanted;
    size_t first, last;
  };
  class Set {
   public:
    bool isEmpty() const { return tokens_.empty(); }
    // false: there is one with this text already.
    bool put(const std::string& text, const Token& token);
    // The first token at `at` or behind, the longest there; `at` moves behind it. nullptr: there is none.
    const Token* find(std::string_view text, size_t& at) const;
    // Where a token that ends at `end` is cut out, if it is; start: of what is not cut yet.
    Place place(std::string_view text, size_t start, size_t end, const Token& token) const;

   private:
    std::vector<Token> tokens_;
    Trie trie_;
    bool begins_[256] = {};  // by a token's first byte
  };

  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_set<int64_t> special_ids_;
  std::unordered_set<std::string> special_texts_;
  Set raw_, normalized_;
};

}  // namespace sinkrt
