#include "text/unigram.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>

#include "text/byte_names.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

constexpr double kUnknownPenalty = 10;
constexpr size_t kNone = static_cast<size_t>(-1);

// A decimal number as the library's JSON reader takes it: digits as far as they fit into 64 bits, then one division or
// multiplication, which is not always the nearest double. Scores that differ in their last bit decide ties.
double libraryNumber(std::string_view text) {
  const bool negative = !text.empty() && text[0] == '-';
  if (negative) text.remove_prefix(1);
  uint64_t digits = 0;
  int64_t exponent = 0;
  bool after_point = false, full = false;
  size_t at = 0;
  for (; at < text.size() && text[at] != 'e' && text[at] != 'E'; ++at) {
    if (text[at] == '.') {
      after_point = true;
      continue;
    }
    const auto digit = static_cast<uint64_t>(text[at] - '0');
    full = full || digits > (std::numeric_limits<uint64_t>::max() - digit) / 10;
    if (!full) digits = digits * 10 + digit;
    if (!full && after_point) --exponent;
    if (full && !after_point) ++exponent;
  }
  if (at < text.size()) {
    constexpr long long kFar = 100'000;  // where every number is 0 or refused as too large
    exponent += std::clamp(std::atoll(std::string(text.substr(at + 1)).c_str()), -kFar, kFar);
  }
  auto value = static_cast<double>(digits);
  while (value != 0 && exponent != 0) {
    const int64_t step = std::min<int64_t>(exponent < 0 ? -exponent : exponent, 308);
    const double power = std::strtod(("1e" + std::to_string(step)).c_str(), nullptr);
    value = exponent < 0 ? value / power : value * power;
    exponent += exponent < 0 ? step : -step;
  }
  return negative ? -value : value;
}

}  // namespace

Unigram::Unigram(const TokenizerFile& file, const Json& part, Vocabulary& vocabulary) {
  file.checkMembers(part, {"unk_id", "vocab", "byte_fallback"});
  byte_fallback_ = file.flag(part, "byte_fallback", false);
  double least = std::numeric_limits<double>::infinity();
  for (const Json& item : file.need(part, "vocab").items) {
    if (item.items.size() != 2 || !item.items[0].isString()) file.refuse("a token without a score", "pairs of both");
    const Json& given = item.items[1];
    if (given.type != Json::Type::kInt && given.type != Json::Type::kFloat) {
      file.refuse("a score that is no number", "a number");
    }
    const double score =
        given.type == Json::Type::kInt ? static_cast<double>(given.integer) : libraryNumber(given.text);
    const auto id = static_cast<int64_t>(scores_.size());
    const std::string& text = item.items[0].text;
    if (text.empty() || !tokens_.put(text, id)) {
      file.refuse("the token '" + text + "' twice, or an empty one", "others");
    }
    vocabulary.put(id, text);
    scores_.push_back(score);
    least = std::min(least, score);
  }
  size_ = scores_.size();
  const Json* unknown = part.find("unk_id");
  if (unknown == nullptr || unknown->isNull()) file.refuse("a Unigram model without unk_id", "one with it");
  unknown_ = file.needId(*unknown);
  if (static_cast<size_t>(unknown_) >= size_) file.refuse("an unk_id outside the vocabulary", "one inside");
  unknown_score_ = least - kUnknownPenalty;
  for (size_t b = 0; b < 256; ++b) byte_tokens_[b] = vocabulary.byteId(static_cast<uint8_t>(b));
}

void Unigram::append(std::string_view stretch, std::vector<int64_t>& out) const {
  int64_t id = -1;
  tokens_.prefixes(stretch, [&](size_t length, int64_t found) {
    if (length == stretch.size()) id = found;
  });
  if (id >= 0) return out.push_back(id);
  if (byte_fallback_) {
    const auto known = [&](char c) { return byte_tokens_[static_cast<uint8_t>(c)] >= 0; };
    if (std::all_of(stretch.begin(), stretch.end(), known)) {
      for (const char c : stretch) out.push_back(byte_tokens_[static_cast<uint8_t>(c)]);
      return;
    }
  }
  out.push_back(unknown_);
}

void Unigram::encode(std::string_view piece, std::vector<int64_t>& out) const {
  struct Node {  // the best way to the byte where it ends
    int64_t id = 0;
    double score = 0;
    size_t start = kNone;
  };
  std::vector<Node> best(piece.size() + 1);
  const auto offer = [&](size_t start, size_t end, int64_t id, double score) {
    Node& node = best[end];
    const double sum = score + best[start].score;
    if (node.start == kNone || sum > node.score) node = {id, sum, start};  // of equals, the first: the longest token
  };
  for (size_t start = 0; start < piece.size();) {
    const size_t size = nextUtf8(piece.substr(start)).size;
    bool is_token = false;  // the single character
    tokens_.prefixes(piece.substr(start), [&](size_t length, int64_t id) {
      offer(start, start + length, id, scores_[static_cast<size_t>(id)]);
      is_token = is_token || length == size;
    });
    if (!is_token) offer(start, start + size, unknown_, unknown_score_);
    start += size;
  }
  // From the end: neighbours that are unknown become one stretch.
  std::vector<std::pair<size_t, size_t>> stretches;
  bool after_unknown = false;
  for (size_t end = piece.size(); end > 0; end = best[end].start) {
    const bool unknown = best[end].id == unknown_;
    if (unknown && after_unknown) {
      stretches.back().first = best[end].start;
    } else {
      stretches.emplace_back(best[end].start, end);
    }
    after_unknown = unknown;
  }
  for (auto stretch = stretches.rbegin(); stretch != stretches.rend(); ++stretch) {
    append(piece.substr(stretch->first, stretch->second - stretch->first), out);
  }
}

void Unigram::encodeBytes(std::string_view piece, std::vector<int64_t>& out) const {
  encode(ByteNames::get().written(piece), out);
}

}  // namespace sinkrt
