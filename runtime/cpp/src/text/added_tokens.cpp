#include "text/added_tokens.h"

#include <algorithm>

#include "text/unicode.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

// Where the last character before `end` begins.
size_t previous(std::string_view text, size_t end) {
  do --end;
  while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xc0) == 0x80);
  return end;
}

}  // namespace

void AddedTokens::read(const TokenizerFile& file, const Json& part, const Normalizer& normalizer, size_t model_size,
                       Vocabulary& vocabulary) {
  auto next_id = static_cast<int64_t>(model_size);
  bool takes_after = false, gives_back = false;
  for (const Json& item : part.items) {
    file.checkMembers(item, {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    const std::string& content = file.needText(item, "content");
    const int64_t given = file.needId(file.need(item, "id"));
    if (content.empty()) continue;  // the library skips empty ones too
    if (ids_.count(content) > 0) file.refuse("the added token '" + content + "' twice", "each once");
    // The library numbers them itself.
    int64_t id = vocabulary.id(content);
    if (id < 0) id = next_id++;
    if (id != given) {
      file.refuse("the added token '" + content + "' with the id " + std::to_string(given),
                  std::to_string(id) + ", which the library gives it");
    }
    ids_[content] = id;
    const bool after_normalizer = file.flag(item, "normalized", true);
    std::string text = content;
    bool at_start = false;
    if (after_normalizer) normalizer.apply(text, at_start);
    const Token token{id, text.size(), file.flag(item, "lstrip", false), file.flag(item, "rstrip", false),
                      file.flag(item, "single_word", false)};
    if (text.empty() || !(after_normalizer ? normalized_ : raw_).put(text, token)) {
      file.refuse("the added token '" + content + "' that is another or nothing after the normalizer",
                  "one of its own");
    }
    if (file.flag(item, "special", false)) {
      special_ids_.insert(id);
      special_texts_.insert(content);
    }
    takes_after = takes_after || token.rstrip;
    gives_back = gives_back || (token.lstrip && !token.rstrip && isSpace(nextUtf8(text).code));
    vocabulary.setText(id, text);
  }
  // White space that both want is a fatal error in the library.
  if (takes_after && gives_back) {
    file.refuse("an added token of white space with lstrip beside one with rstrip", "others");
  }
}

bool AddedTokens::Set::put(const std::string& text, const Token& token) {
  begins_[static_cast<uint8_t>(text[0])] = true;
  const bool is_new = trie_.put(text, static_cast<int64_t>(tokens_.size()));
  tokens_.push_back(token);
  return is_new;
}

const AddedTokens::Token* AddedTokens::Set::find(std::string_view text, size_t& at) const {
  if (tokens_.empty()) return nullptr;
  for (; at < text.size(); ++at) {
    if (!begins_[static_cast<uint8_t>(text[at])]) continue;
    const Token* found = nullptr;
    trie_.prefixes(text.substr(at), [&](size_t, int64_t index) { found = &tokens_[static_cast<size_t>(index)]; });
    if (found != nullptr) {
      at += found->size;
      return found;
    }
  }
  return nullptr;
}

AddedTokens::Place AddedTokens::Set::place(std::string_view text, size_t start, size_t end, const Token& token) const {
  size_t first = end - token.size, last = end;
  if (token.single_word) {
    const bool after_word = first > 0 && isPlainWord(nextUtf8(text.substr(previous(text, first))).code);
    const bool before_word = last < text.size() && isPlainWord(nextUtf8(text.substr(last)).code);
    if (after_word || before_word) return {false, 0, 0};
  }
  if (token.lstrip) {
    while (first > 0) {
      const size_t before = previous(text, first);
      if (!isSpace(nextUtf8(text.substr(before)).code)) break;
      first = before;
    }
    first = std::max(first, start);  // what the token before took is taken
  }
  while (token.rstrip && last < text.size()) {
    const Utf8Step next = nextUtf8(text.substr(last));
    if (!isSpace(next.code)) break;
    last += next.size;
  }
  return {true, first, last};
}

}  // namespace sinkrt
