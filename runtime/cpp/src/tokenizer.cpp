#include "sinkrt/tokenizer.h"

#include <algorithm>
#include <array>
#include <optional>
#include <queue>
#include <unordered_map>
#include <unordered_set>

#include "files.h"
#include "json.h"
#include "pattern.h"
#include "sinkrt/error.h"
#include "unicode.h"
#include "utf8.h"

namespace sinkrt {
namespace {

// GPT-2's, which ByteLevel applies if use_regex is set.
constexpr const char* kByteLevel =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// A token whose text is looked for before anything else.
struct AddedToken {
  std::string content;
  int64_t id;
  bool lstrip, rstrip;  // takes the white space before, after it
};

// One step of the pre-tokenizer. Pieces go in, smaller pieces come out.
struct Splitter {
  enum class Kind : uint8_t { kPattern, kDigits, kDigitRuns } kind;
  bool keep_rest = true;  // what a pattern does not match
  std::optional<Pattern> pattern;
};

// One entry of the merge queue: the pair that begins with the symbol `at`.
struct Candidate {
  int64_t rank;
  size_t at;
  int64_t id;  // what the pair becomes
  bool operator<(const Candidate& other) const {  // std::priority_queue's top is the largest
    return rank != other.rank ? rank > other.rank : at > other.at;
  }
};

struct Merge {
  int64_t rank, id;
};

uint64_t pairKey(int64_t first, int64_t second) {
  return static_cast<uint64_t>(first) << 32 | static_cast<uint64_t>(second);
}

bool isFalse(const Json* value) {
  return value == nullptr || value->isNull() || (value->type == Json::Type::kBool && !value->boolean) ||
         (value->isString() && value->text.empty());
}

bool isTrue(const Json* value) { return value != nullptr && value->type == Json::Type::kBool && value->boolean; }

}  // namespace

struct Tokenizer::Data {
  std::string name;
  std::vector<std::string> bytes;             // of each id, as decoded
  std::vector<bool> known, special;           // by id
  std::unordered_map<std::string, int64_t> ids;  // by text, added tokens included
  std::unordered_map<std::string, int64_t> words;  // the model's, by their bytes
  std::array<int64_t, 256> symbols{};            // of single bytes; -1: none
  std::unordered_map<uint64_t, Merge> merges;
  bool ignore_merges = false;
  std::array<std::vector<AddedToken>, 256> raw, normalized;  // by first byte, the longest first
  bool has_raw = false, has_normalized = false;
  bool nfc = false;
  bool prefix_space = false;
  size_t byte_level_step = 0;  // where in `splitters` ByteLevel begins, and puts that space
  std::vector<Splitter> splitters;
  std::vector<int64_t> before, after;  // what is added around a text
  std::vector<int64_t> newline;

  [[noreturn]] void refuse(const std::string& received, const std::string& expected) const {
    throw Error(Code::kBundle, problem(name, received, expected, "feed token ids, or use the Python runtime"));
  }

  // A member's type, e.g. "ByteLevel"; "" for null.
  std::string typeOf(const Json& value) const {
    if (value.isNull()) return "";
    const Json* type = value.find("type");
    if (type == nullptr || !type->isString()) refuse("a part without a type", "a file of the library 'tokenizers'");
    return type->text;
  }

  const Json& need(const Json& object, const char* key) const {
    const Json* value = object.find(key);
    if (value == nullptr) refuse(std::string("no key '") + key + "'", "a file of the library 'tokenizers'");
    return *value;
  }

  int64_t needId(const Json& value) const {
    constexpr int64_t kMostTokens = 1 << 24;
    if (value.type != Json::Type::kInt || value.integer < 0 || value.integer >= kMostTokens) {
      refuse("an id that is none", "0 .. 2^24 - 1");
    }
    return value.integer;
  }

  void setToken(int64_t id, std::string decoded) {
    const auto index = static_cast<size_t>(id);
    if (index >= bytes.size()) {
      bytes.resize(index + 1);
      known.resize(index + 1);
      special.resize(index + 1);
    }
    bytes[index] = std::move(decoded);
    known[index] = true;
  }

  // Items of a "Sequence", or the part itself.
  std::vector<const Json*> flattened(const Json& part, const char* key, int depth = 0) const {
    if (part.isNull()) return {};
    if (typeOf(part) != "Sequence") return {&part};
    if (depth > 4) refuse("sequences nested too deeply", "a few levels");
    std::vector<const Json*> out;
    for (const Json& item : need(part, key).items) {
      for (const Json* inner : flattened(item, key, depth + 1)) out.push_back(inner);
    }
    return out;
  }

  void readModel(const Json& model);
  void readAdded(const Json& tokens);
  void readNormalizer(const Json& part);
  void readSplitters(const Json& part);
  void readTemplate(const Json& part);

  // Cuts text at added tokens: calls `on_token` and `on_text` in order.
  template <typename OnToken, typename OnText>
  void cut(std::string_view text, const std::array<std::vector<AddedToken>, 256>& tokens, OnToken on_token,
           OnText on_text) const;
  void split(std::string_view text, size_t step, std::vector<int64_t>& out) const;
  void merge(std::string_view word, std::vector<int64_t>& out) const;
};

namespace {

// Bytes as byte-level vocabularies write them: printable ones as themselves, the others from U+0100 on.
struct ByteNames {
  std::array<uint32_t, 256> code{};
  std::unordered_map<uint32_t, uint8_t> byte;

  ByteNames() {
    uint32_t other = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      code[b] = printable ? b : other++;
      byte[code[b]] = static_cast<uint8_t>(b);
    }
  }

  // The bytes that a vocabulary's text stands for; nothing if it is not written so.
  std::optional<std::string> bytes(std::string_view text) const {
    std::string out;
    while (!text.empty()) {
      const Utf8Step step = nextUtf8(text);
      const auto found = byte.find(step.code);
      if (found == byte.end()) return std::nullopt;
      out += static_cast<char>(found->second);
      text.remove_prefix(step.size);
    }
    return out;
  }
};

const ByteNames& byteNames() {
  static const ByteNames names;
  return names;
}

}  // namespace

void Tokenizer::Data::readModel(const Json& model) {
  const std::string type = typeOf(model);
  if (type != "BPE") refuse("a model of type '" + type + "'", "byte-level BPE");
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!isFalse(model.find(key))) refuse(std::string("a BPE model with ") + key, "one without");
  }
  ignore_merges = isTrue(model.find("ignore_merges"));
  std::unordered_map<std::string_view, int64_t> vocab;
  const Json& words_of = need(model, "vocab");
  for (const auto& [text, value] : words_of.members) {
    const int64_t id = needId(value);
    vocab.emplace(text, id);
    ids.emplace(text, id);
    std::optional<std::string> decoded = byteNames().bytes(text);
    if (decoded) words.emplace(*decoded, id);
    setToken(id, decoded ? *std::move(decoded) : text);
  }
  bool whole = true;
  for (size_t b = 0; b < 256; ++b) {
    const auto found = words.find(std::string(1, static_cast<char>(b)));
    symbols[b] = found == words.end() ? -1 : found->second;
    whole = whole && symbols[b] >= 0;
  }
  if (!whole && (!isFalse(model.find("unk_token")) || isTrue(model.find("byte_fallback")))) {
    refuse("a vocabulary without all 256 bytes, and a token for what is unknown", "a byte-level vocabulary");
  }
  int64_t rank = 0;
  for (const Json& item : need(model, "merges").items) {
    std::string first, second;
    if (item.isString()) {
      const size_t space = item.text.find(' ');
      first = item.text.substr(0, space);
      second = space == std::string::npos ? "" : item.text.substr(space + 1);
    } else if (item.items.size() == 2) {
      first = item.items[0].text;
      second = item.items[1].text;
    }
    const auto a = vocab.find(first), b = vocab.find(second), both = vocab.find(first + second);
    if (a == vocab.end() || b == vocab.end() || both == vocab.end()) {
      refuse("a merge of '" + first + "' and '" + second + "'", "tokens of the vocabulary");
    }
    merges[pairKey(a->second, b->second)] = {rank++, both->second};
  }
}

void Tokenizer::Data::readAdded(const Json& tokens) {
  for (const Json& token : tokens.items) {
    const Json& content = need(token, "content");
    const int64_t id = needId(need(token, "id"));
    if (!content.isString() || content.text.empty()) continue;  // the library skips empty ones too
    if (isTrue(token.find("single_word"))) refuse("an added token for single words", "one found anywhere");
    const bool after_normalizer = isTrue(token.find("normalized"));
    std::string text = after_normalizer && nfc ? sinkrt::nfc(content.text) : content.text;
    setToken(id, byteNames().bytes(content.text).value_or(content.text));
    special[static_cast<size_t>(id)] = isTrue(token.find("special"));
    ids[content.text] = id;
    auto& bucket = (after_normalizer ? normalized : raw)[static_cast<uint8_t>(text[0])];
    (after_normalizer ? has_normalized : has_raw) = true;
    bucket.push_back({std::move(text), id, isTrue(token.find("lstrip")), isTrue(token.find("rstrip"))});
  }
  for (auto* table : {&raw, &normalized}) {
    for (auto& bucket : *table) {
      std::stable_sort(bucket.begin(), bucket.end(),
                       [](const auto& a, const auto& b) { return a.content.size() > b.content.size(); });
    }
  }
}

void Tokenizer::Data::readNormalizer(const Json& part) {
  for (const Json* item : flattened(part, "normalizers")) {
    const std::string type = typeOf(*item);
    if (type != "NFC") refuse("a normalizer of type '" + type + "'", "none or NFC");
    nfc = true;
  }
}

void Tokenizer::Data::readSplitters(const Json& part) {
  const std::vector<const Json*> items = flattened(part, "pretokenizers");
  for (size_t i = 0; i < items.size(); ++i) {
    const Json& item = *items[i];
    const std::string type = typeOf(item);
    if (type == "ByteLevel") {
      if (i + 1 != items.size()) refuse("a pre-tokenizer after ByteLevel", "ByteLevel as the last");
      prefix_space = isTrue(item.find("add_prefix_space"));
      byte_level_step = splitters.size();
      const Json* regex = item.find("use_regex");
      if (regex == nullptr || isTrue(regex)) splitters.push_back({Splitter::Kind::kPattern, true, Pattern(kByteLevel)});
      return;
    }
    if (type == "Digits") {
      const bool single = isTrue(item.find("individual_digits"));
      splitters.push_back({single ? Splitter::Kind::kDigits : Splitter::Kind::kDigitRuns, true, std::nullopt});
    } else if (type == "Split") {
      const Json& pattern = need(item, "pattern");
      const Json* regex = pattern.find("Regex");
      if (regex == nullptr) refuse("a Split at a plain string", "one at a regular expression");
      const std::string behavior = need(item, "behavior").text;
      const bool invert = isTrue(item.find("invert"));
      if (behavior != "Isolated" && !(behavior == "Removed" && invert)) {
        refuse("a Split that is '" + behavior + "'", "Isolated, or Removed and inverted");
      }
      try {
        splitters.push_back({Splitter::Kind::kPattern, behavior == "Isolated", Pattern(regex->text)});
      } catch (const PatternError& error) {
        refuse(std::string("a Split at ") + error.what(), "a simpler regular expression");
      }
    } else {
      refuse("a pre-tokenizer of type '" + type + "'", "ByteLevel, Split, Digits, Sequence");
    }
  }
  refuse("no ByteLevel pre-tokenizer", "byte-level BPE");
}

void Tokenizer::Data::readTemplate(const Json& part) {
  for (const Json* item : flattened(part, "processors")) {
    const std::string type = typeOf(*item);
    if (type == "ByteLevel") continue;  // concerns offsets only
    if (type != "TemplateProcessing") {
      refuse("a post-processor of type '" + type + "'", "ByteLevel, TemplateProcessing");
    }
    const Json& specials = need(*item, "special_tokens");
    bool text_came = false;
    std::vector<int64_t> first, last;
    for (const Json& piece : need(*item, "single").items) {
      if (const Json* token = piece.find("SpecialToken")) {
        const Json* facts = specials.find(need(*token, "id").text);
        if (facts == nullptr) refuse("a template with an unknown token", "one that special_tokens lists");
        for (const Json& id : need(*facts, "ids").items) (text_came ? last : first).push_back(needId(id));
      } else if (piece.find("Sequence") != nullptr && !text_came) {
        text_came = true;
      } else {
        refuse("a template with two texts", "one text with special tokens around it");
      }
    }
    // A later processor goes around what an earlier one made.
    before.insert(before.begin(), first.begin(), first.end());
    after.insert(after.end(), last.begin(), last.end());
  }
}

template <typename OnToken, typename OnText>
void Tokenizer::Data::cut(std::string_view text, const std::array<std::vector<AddedToken>, 256>& tokens,
                          OnToken on_token, OnText on_text) const {
  size_t start = 0;  // of the text that is not cut yet
  for (size_t at = 0; at < text.size();) {
    const AddedToken* found = nullptr;
    for (const AddedToken& token : tokens[static_cast<uint8_t>(text[at])]) {
      if (text.compare(at, token.content.size(), token.content) == 0) {
        found = &token;
        break;
      }
    }
    if (found == nullptr) {
      ++at;
      continue;
    }
    size_t first = at, last = at + found->content.size();
    while (found->lstrip && first > start) {
      size_t previous = first - 1;
      while (previous > start && (static_cast<uint8_t>(text[previous]) & 0xc0) == 0x80) --previous;
      if (!isSpace(nextUtf8(text.substr(previous)).code)) break;
      first = previous;
    }
    while (found->rstrip && last < text.size() && isSpace(nextUtf8(text.substr(last)).code)) {
      last += nextUtf8(text.substr(last)).size;
    }
    if (first > start) on_text(text.substr(start, first - start));
    on_token(found->id);
    start = at = last;
  }
  if (start < text.size()) on_text(text.substr(start));
}

void Tokenizer::Data::split(std::string_view text, size_t step, std::vector<int64_t>& out) const {
  if (text.empty()) return;
  if (prefix_space && step == byte_level_step && text[0] != ' ') return split(" " + std::string(text), step, out);
  if (step == splitters.size()) return merge(text, out);
  const Splitter& splitter = splitters[step];
  if (splitter.kind == Splitter::Kind::kPattern) {
    size_t start = 0;
    for (size_t at = 0; at < text.size();) {
      const int64_t size = splitter.pattern->match(text, at);
      if (size <= 0) {
        at += nextUtf8(text.substr(at)).size;
        continue;
      }
      if (at > start && splitter.keep_rest) split(text.substr(start, at - start), step + 1, out);
      split(text.substr(at, static_cast<size_t>(size)), step + 1, out);
      start = at = at + static_cast<size_t>(size);
    }
    if (start < text.size() && splitter.keep_rest) split(text.substr(start), step + 1, out);
    return;
  }
  size_t start = 0;
  bool in_digits = false;
  for (size_t at = 0; at < text.size();) {
    const Utf8Step character = nextUtf8(text.substr(at));
    const bool digit = isNumeric(character.code);
    if (at > start && (digit != in_digits || (digit && splitter.kind == Splitter::Kind::kDigits))) {
      split(text.substr(start, at - start), step + 1, out);
      start = at;
    }
    in_digits = digit;
    at += character.size;
  }
  split(text.substr(start), step + 1, out);
}

void Tokenizer::Data::merge(std::string_view word, std::vector<int64_t>& out) const {
  if (ignore_merges) {
    const auto found = words.find(std::string(word));
    if (found != words.end()) {
      out.push_back(found->second);
      return;
    }
  }
  struct Symbol {
    int64_t id;
    size_t previous, next;
    bool gone;
  };
  constexpr size_t kNone = static_cast<size_t>(-1);
  std::vector<Symbol> chain;
  chain.reserve(word.size());
  for (const char c : word) {
    const int64_t id = symbols[static_cast<uint8_t>(c)];
    if (id < 0) continue;  // not in the vocabulary, which has no token for what is unknown: left out
    chain.push_back({id, chain.size() - 1, chain.size() + 1, false});
  }
  if (chain.empty()) return;
  chain.back().next = kNone;
  std::priority_queue<Candidate> queue;
  const auto offer = [&](size_t at) {
    if (at == kNone || chain[at].next == kNone) return;
    const auto found = merges.find(pairKey(chain[at].id, chain[chain[at].next].id));
    if (found != merges.end()) queue.push({found->second.rank, at, found->second.id});
  };
  for (size_t i = 0; i < chain.size(); ++i) offer(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = chain[best.at];
    if (left.gone || left.next == kNone) continue;
    Symbol& right = chain[left.next];
    const auto found = merges.find(pairKey(left.id, right.id));
    if (found == merges.end() || found->second.id != best.id) continue;  // one of the two has changed
    left.id = best.id;
    right.gone = true;
    left.next = right.next;
    if (left.next != kNone) chain[left.next].previous = best.at;
    offer(left.previous);
    offer(best.at);
  }
  for (size_t i = 0; i != kNone; i = chain[i].next) out.push_back(chain[i].id);
}

Tokenizer::Tokenizer(std::unique_ptr<Data> data) : data_(std::move(data)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const std::string& path) {
  std::string text;
  if (!readFile(path, text)) {
    throw Error(Code::kBundle, problem("tokenizer", "'" + path + "' (" + text + ")", "a readable file",
                                       "export the model again"));
  }
  return fromJson(text, path.substr(path.rfind('/') + 1));
}

Tokenizer Tokenizer::fromJson(const std::string& text, const std::string& name) {
  auto data = std::make_unique<Data>();
  data->name = name;
  Json root;
  try {
    root = parseJson(text);
  } catch (const JsonError& error) {
    data->refuse(std::string("invalid JSON (") + error.what() + ")", "a file of the library 'tokenizers'");
  }
  const auto part = [&](const char* key) -> const Json& {
    static const Json nothing;
    const Json* value = root.find(key);
    return value == nullptr ? nothing : *value;
  };
  for (const char* key : {"truncation", "padding"}) {
    if (!part(key).isNull()) data->refuse(std::string("a tokenizer with ") + key, "one without");
  }
  const std::string decoder = data->typeOf(part("decoder"));
  if (decoder != "ByteLevel") data->refuse("a decoder of type '" + decoder + "'", "ByteLevel");
  data->readModel(data->need(root, "model"));
  data->readNormalizer(part("normalizer"));
  data->readAdded(part("added_tokens"));
  data->readSplitters(part("pre_tokenizer"));
  data->readTemplate(part("post_processor"));
  Tokenizer tokenizer(std::move(data));
  tokenizer.data_->newline = tokenizer.encode("\n", false);
  return tokenizer;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool special) const {
  if (!isUtf8(text)) {
    throw Error(Code::kUsage, problem("text", "something that is not Unicode text", "valid UTF-8",
                                      "check the encoding of the input"));
  }
  std::vector<int64_t> out;
  if (special) out = data_->before;
  const auto token = [&](int64_t id) { out.push_back(id); };
  const auto plain = [&](std::string_view piece) { data_->split(piece, 0, out); };
  data_->cut(text, data_->raw, token, [&](std::string_view piece) {
    const std::string kept = data_->nfc ? nfc(piece) : std::string(piece);
    data_->cut(kept, data_->normalized, token, plain);
  });
  if (special) out.insert(out.end(), data_->after.begin(), data_->after.end());
  return out;
}

std::vector<int64_t> Tokenizer::encodeNext(std::string_view text) const {
  // Some tokenizers put a space before every text. So the text is encoded after a line break, which is taken off again.
  const std::vector<int64_t>& newline = data_->newline;
  std::vector<int64_t> ids = encode("\n" + std::string(text), false);
  if (!newline.empty() && ids.size() >= newline.size() && std::equal(newline.begin(), newline.end(), ids.begin())) {
    ids.erase(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(newline.size()));
    return ids;
  }
  return encode(text, false);  // the line break became part of another token
}

std::string_view Tokenizer::bytes(int64_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= data_->bytes.size()) return {};
  return data_->special[static_cast<size_t>(id)] ? std::string_view() : data_->bytes[static_cast<size_t>(id)];
}

bool Tokenizer::hasText(int64_t id) const {
  return id >= 0 && static_cast<size_t>(id) < data_->bytes.size() && data_->known[static_cast<size_t>(id)] &&
         !data_->special[static_cast<size_t>(id)];
}

std::string Tokenizer::decode(const int64_t* ids, size_t count, bool keep_special) const {
  std::string all, out;
  for (size_t i = 0; i < count; ++i) {
    const bool inside = ids[i] >= 0 && static_cast<size_t>(ids[i]) < data_->bytes.size();
    all += keep_special && inside ? std::string_view(data_->bytes[static_cast<size_t>(ids[i])]) : bytes(ids[i]);
  }
  appendLossy(out, all);
  return out;
}

int64_t Tokenizer::id(std::string_view token) const {
  const auto found = data_->ids.find(std::string(token));
  return found == data_->ids.end() ? -1 : found->second;
}

size_t Tokenizer::longest() const {
  size_t most = 0;
  for (const std::string& token : data_->bytes) most = std::max(most, token.size());
  return most;
}

StreamingDecoder::StreamingDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
  const size_t most = kMaxPending * tokenizer.longest();
  context_.reserve(most);
  pending_.reserve(most);
  joined_.reserve(2 * most);
  before_.reserve(3 * most);  // a byte that is no UTF-8 becomes three
  whole_.reserve(6 * most);
}

std::string_view StreamingDecoder::piece() {
  before_.clear();
  whole_.clear();
  appendLossy(before_, context_);
  joined_.assign(context_).append(pending_);
  appendLossy(whole_, joined_);
  // Bytes can spoil a character before them; it has been told already, as it was.
  if (whole_.compare(0, before_.size(), before_) == 0) return std::string_view(whole_).substr(before_.size());
  whole_.clear();
  appendLossy(whole_, pending_);
  return whole_;
}

std::string_view StreamingDecoder::push(int64_t id) {
  if (!tokenizer_.hasText(id)) return {};
  pending_ += tokenizer_.bytes(id);
  ++num_pending_;
  const std::string_view text = piece();
  const bool unfinished = text.size() >= 3 && text.substr(text.size() - 3) == "\xef\xbf\xbd";
  if (unfinished && num_pending_ < kMaxPending) return {};
  context_.assign(pending_);
  pending_.clear();
  num_pending_ = 0;
  return text;
}

std::string_view StreamingDecoder::flush() {
  const std::string_view text = num_pending_ > 0 ? piece() : std::string_view();
  context_.clear();
  pending_.clear();
  num_pending_ = 0;
  return text;
}

}  // namespace sinkrt
