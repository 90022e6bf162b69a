#include "text/bpe.h"

#include <optional>
#include <queue>
#include <stdexcept>

#include "text/byte_names.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

constexpr size_t kFew = 48;  // symbols whose merges are found without a queue
constexpr uint32_t kNone = ~uint32_t{0};

// One entry of the merge queue: the pair that begins with the symbol `at`.
struct Candidate {
  uint32_t rank, id, at;                          // id: what the pair becomes
  bool operator<(const Candidate& other) const {  // std::priority_queue's top is the largest
    return rank != other.rank ? rank > other.rank : at > other.at;
  }
};

// Whether an option is off: absent, null, or what stands for it.
bool isOff(const Json* value) {
  if (value == nullptr || value->isNull()) return true;
  switch (value->type) {
    case Json::Type::kString:
      return value->text.empty();
    case Json::Type::kInt:
      return value->integer == 0;
    case Json::Type::kFloat:
      return value->number == 0;
    default:
      return false;
  }
}

}  // namespace

Bpe::Bpe(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary) {
  file.checkMembers(part, {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                           "byte_fallback", "ignore_merges", "vocab", "merges"});
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!isOff(part.find(key))) file.refuse(std::string("a BPE model with ") + key, "one without");
  }
  ignore_merges_ = file.flag(part, "ignore_merges", false);
  byte_fallback_ = file.flag(part, "byte_fallback", false);
  fuse_unknown_ = file.flag(part, "fuse_unk", false);
  readVocabulary(file, part, vocabulary);
  readUnknown(file, part, vocabulary);
  readMerges(file, part, vocabulary);
}

void Bpe::readVocabulary(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary) {
  byte_symbols_.fill(-1);
  const ByteNames& names = ByteNames::get();
  for (const auto& [text, value] : file.need(part, "vocab").members) {
    const int64_t id = file.needId(value);
    if (vocabulary.has(id)) file.refuse("two tokens with the id " + std::to_string(id), "one");
    vocabulary.put(id, text);
    ++size_;
    if (!text.empty()) {
      const Utf8Step first = nextUtf8(text);
      if (first.size == text.size()) {
        const size_t page = first.code >> 8;
        if (page >= pages_.size()) pages_.resize(page + 1);
        if (pages_[page].empty()) pages_[page].assign(256, -1);
        pages_[page][first.code & 0xff] = static_cast<int32_t>(id);
      }
    }
    if (ignore_merges_) {
      words_.emplace(text, id);
      if (std::optional<std::string> bytes = names.bytes(text)) byte_words_.emplace(*std::move(bytes), id);
    }
  }
  for (size_t b = 0; b < 256; ++b) {
    const std::string written = names.written(std::string(1, static_cast<char>(b)));
    byte_symbols_[b] = characterId(nextUtf8(written).code);
    has_all_bytes_ = has_all_bytes_ && byte_symbols_[b] >= 0;
    byte_tokens_[b] = vocabulary.byteId(static_cast<uint8_t>(b));
  }
}

void Bpe::readUnknown(const TokenizerFile& file, const Json& part, const Vocabulary& vocabulary) {
  const Json* token = part.find("unk_token");
  if (token == nullptr || token->isNull()) return;
  unknown_ = vocabulary.id(file.needText(part, "unk_token"));
  // The library fails at the first character that needs it, which a vocabulary of all bytes never does.
  if (unknown_ < 0 && !has_all_bytes_) file.refuse("an unk_token that is not in the vocabulary", "one that is");
}

void Bpe::readMerges(const TokenizerFile& file, const Json& part, const Vocabulary& vocabulary) {
  const Json& merges = file.need(part, "merges");
  merges_.reserve(merges.items.size());
  uint32_t rank = 0;
  for (const Json& item : merges.items) {
    std::string first, second;
    if (item.isString()) {
      if (rank == 0 && item.text.rfind("#version", 0) == 0) continue;  // of a merges.txt
      const size_t space = item.text.find(' ');
      first = item.text.substr(0, space);
      second = space == std::string::npos ? "" : item.text.substr(space + 1);
      if (second.find(' ') != std::string::npos) second.clear();
    } else if (item.items.size() == 2) {
      first = item.items[0].text;
      second = item.items[1].text;
    }
    const int64_t a = vocabulary.id(first), b = vocabulary.id(second), both = vocabulary.id(first + second);
    if (a < 0 || b < 0 || both < 0) {
      file.refuse("a merge of '" + first + "' and '" + second + "'", "tokens of the vocabulary");
    }
    merges_.put(static_cast<uint32_t>(a), static_cast<uint32_t>(b), {rank++, static_cast<uint32_t>(both)});
  }
}

void Bpe::symbols(std::string_view piece, std::vector<uint32_t>& out) const {
  bool unknown = false;  // one is still to be appended
  while (!piece.empty()) {
    const Utf8Step step = nextUtf8(piece);
    const std::string_view character = piece.substr(0, step.size);
    piece.remove_prefix(step.size);
    const int64_t id = characterId(step.code);
    if (id >= 0) {
      if (unknown) out.push_back(static_cast<uint32_t>(unknown_));
      unknown = false;
      out.push_back(static_cast<uint32_t>(id));
      continue;
    }
    if (byte_fallback_) {
      bool whole = true;
      for (const char c : character) whole = whole && byte_tokens_[static_cast<uint8_t>(c)] >= 0;
      if (whole) {  // an unknown character before these bytes comes after them: so it is in the library
        for (const char c : character) out.push_back(static_cast<uint32_t>(byte_tokens_[static_cast<uint8_t>(c)]));
        continue;
      }
    }
    if (unknown_ < 0) continue;
    if (unknown && !fuse_unknown_) out.push_back(static_cast<uint32_t>(unknown_));
    unknown = true;
  }
  if (unknown) out.push_back(static_cast<uint32_t>(unknown_));
}

void Bpe::encode(std::string_view piece, std::vector<int64_t>& out) const {
  if (ignore_merges_) {
    const auto found = words_.find(std::string(piece));
    if (found != words_.end()) return out.push_back(found->second);
  }
  std::vector<uint32_t> ids;
  ids.reserve(piece.size());
  symbols(piece, ids);
  if (ids.size() <= kFew) return mergeFew(ids.data(), ids.size(), out);
  mergeMany(ids, out);
}

void Bpe::encodeBytes(std::string_view piece, std::vector<int64_t>& out) const {
  if (!has_all_bytes_ && (unknown_ >= 0 || byte_fallback_)) return encode(ByteNames::get().written(piece), out);
  if (ignore_merges_) {
    const auto found = byte_words_.find(std::string(piece));
    if (found != byte_words_.end()) return out.push_back(found->second);
  }
  uint32_t few[kFew];
  std::vector<uint32_t> many;
  uint32_t* ids = few;
  if (piece.size() > kFew) {
    many.resize(piece.size());
    ids = many.data();
  }
  size_t count = 0;
  for (const char c : piece) {
    const int64_t id = byte_symbols_[static_cast<uint8_t>(c)];
    if (id >= 0) ids[count++] = static_cast<uint32_t>(id);  // others are left out
  }
  if (count <= kFew) return mergeFew(ids, count, out);
  many.resize(count);
  mergeMany(many, out);
}

// The library takes the pair of the lowest rank, the first of several, until there is none. Of few symbols that is
// quickest found by looking at each.
void Bpe::mergeFew(uint32_t* ids, size_t count, std::vector<int64_t>& out) const {
  Merge pairs[kFew];  // of each symbol and the next
  const auto look = [&](size_t at) {
    const Merge* found = merges_.find(ids[at], ids[at + 1]);
    pairs[at] = found == nullptr ? Merge{~uint32_t{0}, 0} : *found;
  };
  for (size_t i = 0; i + 1 < count; ++i) look(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (pairs[i].rank < pairs[best].rank) best = i;
    }
    if (pairs[best].rank == ~uint32_t{0}) break;
    ids[best] = pairs[best].id;
    --count;
    for (size_t i = best + 1; i < count; ++i) {
      ids[i] = ids[i + 1];
      if (i + 1 < count) pairs[i] = pairs[i + 1];
    }
    if (best > 0) look(best - 1);
    if (best + 1 < count) look(best);
  }
  out.insert(out.end(), ids, ids + count);
}

void Bpe::mergeMany(const std::vector<uint32_t>& ids, std::vector<int64_t>& out) const {
  struct Symbol {  // small: a text without splits is one chain, which is walked in no order
    uint32_t id, previous, next;
  };
  if (ids.size() >= kNone) throw std::length_error("a text of 2^32 symbols");
  const auto size = static_cast<uint32_t>(ids.size());
  std::vector<Symbol> chain;
  chain.reserve(size);
  for (uint32_t i = 0; i < size; ++i) chain.push_back({ids[i], i - 1, i + 1});
  chain.back().next = kNone;
  std::vector<Candidate> first;
  first.reserve(ids.size());
  const auto candidate = [&](uint32_t at) -> std::optional<Candidate> {
    if (at == kNone || chain[at].next == kNone) return std::nullopt;
    const Merge* found = merges_.find(chain[at].id, chain[chain[at].next].id);
    if (found == nullptr) return std::nullopt;
    return Candidate{found->rank, found->id, at};
  };
  for (uint32_t i = 0; i < size; ++i) {
    if (const auto found = candidate(i)) first.push_back(*found);
  }
  std::priority_queue<Candidate> queue({}, std::move(first));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = chain[best.at];
    if (left.id == kNone || left.next == kNone) continue;
    Symbol& right = chain[left.next];
    const Merge* found = merges_.find(left.id, right.id);
    if (found == nullptr || found->id != best.id) continue;  // one of the two has changed
    left.id = best.id;
    right.id = kNone;  // gone
    left.next = right.next;
    if (left.next != kNone) chain[left.next].previous = best.at;
    for (const uint32_t at : {left.previous, best.at}) {
      if (const auto made = candidate(at)) queue.push(*made);
    }
  }
  for (uint32_t i = 0; i != kNone; i = chain[i].next) out.push_back(chain[i].id);
}

}  // namespace sinkrt
