#include "text/unicode.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "text/utf8.h"

namespace sinkrt {
namespace {

#include "text/unicode_tables.inc"

const char* const kNames[] = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe",
                              "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn"};

// Hangul's arithmetic (Unicode 16, 3.12).
constexpr uint32_t kSyllable = 0xac00, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11a7;
constexpr uint32_t kNumVowels = 21, kNumTails = 28, kNumLeads = 19;
constexpr uint32_t kNumSyllables = kNumLeads * kNumVowels * kNumTails;

uint32_t combiningClass(uint32_t code) {
  const uint32_t* after = std::upper_bound(std::begin(kCombining), std::end(kCombining), code << 8 | 0xff);
  return after[-1] & 0xff;
}

// What a table of make_unicode_tables.py's `mapping` has for a code point; empty: nothing.
class Mapping {
 public:
  template <size_t N, size_t M>
  Mapping(const uint32_t (&keys)[N], const uint32_t (&values)[M]) : keys_(keys), values_(values), starts_(N) {
    uint32_t at = 0;
    for (size_t i = 0; i < N; ++i) {
      starts_[i] = at;
      at += keys[i] & kLength;
    }
  }

  // Appends what `code` becomes; false: it stays as it is.
  bool append(uint32_t code, std::vector<uint32_t>& out) const {
    const uint32_t* end = keys_ + starts_.size();
    const uint32_t* found = std::lower_bound(keys_, end, code << kShift);
    if (found == end || *found >> kShift != code) return false;
    const uint32_t* first = values_ + starts_[static_cast<size_t>(found - keys_)];
    out.insert(out.end(), first, first + (*found & kLength));
    return true;
  }

 private:
  static constexpr uint32_t kShift = 5, kLength = 31;
  const uint32_t* keys_;
  const uint32_t* values_;
  std::vector<uint32_t> starts_;
};

const Mapping& canonical() {
  static const Mapping mapping(kCanonicalKeys, kCanonicalValues);
  return mapping;
}

const Mapping& compatible() {
  static const Mapping mapping(kCompatibleKeys, kCompatibleValues);
  return mapping;
}

const Mapping& lower() {
  static const Mapping mapping(kLowerKeys, kLowerValues);
  return mapping;
}

// Whether a code point is inside one of the runs whose edges a table has.
template <size_t N>
bool inside(const uint32_t (&edges)[N], uint32_t code) {
  const uint32_t* after = std::upper_bound(std::begin(edges), std::end(edges), code);
  return (after - std::begin(edges)) % 2 == 1;
}

void decompose(uint32_t code, const Mapping& mapping, std::vector<uint32_t>& out) {
  if (code - kSyllable < kNumSyllables) {
    const uint32_t index = code - kSyllable, tail = index % kNumTails;
    out.push_back(kLead + index / (kNumVowels * kNumTails));
    out.push_back(kVowel + index / kNumTails % kNumVowels);
    if (tail != 0) out.push_back(kTail + tail);
    return;
  }
  if (!mapping.append(code, out)) out.push_back(code);
}

// What two characters compose to; 0: nothing.
uint32_t composed(uint32_t first, uint32_t second) {
  if (first - kLead < kNumLeads && second - kVowel < kNumVowels) {
    return kSyllable + ((first - kLead) * kNumVowels + (second - kVowel)) * kNumTails;
  }
  if (first - kSyllable < kNumSyllables && (first - kSyllable) % kNumTails == 0 && second > kTail &&
      second < kTail + kNumTails) {
    return first + (second - kTail);
  }
  size_t low = 0, high = std::size(kCompositions) / 3;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    const uint32_t* triple = kCompositions + 3 * middle;
    if (triple[0] == first && triple[1] == second) return triple[2];
    const bool less = triple[0] != first ? triple[0] < first : triple[1] < second;
    (less ? low : high) = less ? middle + 1 : middle;
  }
  return 0;
}

}  // namespace

uint32_t categoryBit(uint32_t code) {
  const uint32_t* after = std::upper_bound(std::begin(kCategories), std::end(kCategories), code << 5 | 0x1f);
  return 1u << (after[-1] & 0x1f);
}

uint32_t categoryMask(std::string_view name) {
  uint32_t mask = 0;
  for (size_t i = 0; i < std::size(kNames); ++i) {
    const std::string_view known = kNames[i];
    if (name == known || (name.size() == 1 && name[0] == known[0])) mask |= 1u << i;
  }
  return mask;
}

bool isSpace(uint32_t code) {
  if (code < 0x80) return code == ' ' || (code >= 9 && code <= 13);
  return code == 0x85 || code == 0xa0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
         code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

bool isNumeric(uint32_t code) {
  return inside(kNumeric, code);
}
bool isPunctuation(uint32_t code) {
  return inside(kPunctuation, code);
}
bool isClassWord(uint32_t code) {
  return inside(kWord, code);
}

bool isWord(uint32_t code) {  // Latin-1's small digits and fractions too
  return isClassWord(code) || code == 0xb2 || code == 0xb3 || code == 0xb9 || (code >= 0xbc && code <= 0xbe);
}

bool isPlainWord(uint32_t code) {
  return isClassWord(code) || code == 0x200c || code == 0x200d;
}
bool isMark(uint32_t code) {
  return inside(kMark, code);
}

namespace {

// Sorts runs of combining characters by their class.
void sortMarks(std::vector<uint32_t>& codes) {
  for (size_t start = 0; start < codes.size();) {
    if (combiningClass(codes[start]) == 0) {
      ++start;
      continue;
    }
    size_t end = start;
    while (end < codes.size() && combiningClass(codes[end]) != 0) ++end;
    std::stable_sort(codes.data() + start, codes.data() + end,
                     [](uint32_t a, uint32_t b) { return combiningClass(a) < combiningClass(b); });
    start = end;
  }
}

std::vector<uint32_t> compose(const std::vector<uint32_t>& codes) {
  std::vector<uint32_t> out;
  size_t starter = codes.size();  // in `out`; none yet
  uint32_t last_class = 0;        // of what stands between the starter and here
  for (const uint32_t code : codes) {
    const uint32_t cls = combiningClass(code);
    const bool blocked = starter < out.size() && starter + 1 != out.size() && (last_class == 0 || last_class >= cls);
    if (starter < out.size() && !blocked) {
      if (const uint32_t whole = composed(out[starter], code)) {
        out[starter] = whole;
        continue;
      }
    }
    out.push_back(code);
    last_class = cls;
    if (cls == 0) starter = out.size() - 1;
  }
  return out;
}

bool isAscii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0x80; });
}

}  // namespace

std::string normalized(std::string_view text, Form form) {
  if (isAscii(text)) return std::string(text);
  const Mapping& mapping = form == Form::kNfkc || form == Form::kNfkd ? compatible() : canonical();
  std::vector<uint32_t> codes;
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Step step = nextUtf8(rest);
    rest.remove_prefix(step.size);
    decompose(step.code, mapping, codes);
  }
  sortMarks(codes);
  if (form == Form::kNfc || form == Form::kNfkc) codes = compose(codes);
  std::string result;
  for (const uint32_t code : codes) appendUtf8(result, code);
  return result;
}

std::string lowered(std::string_view text) {
  std::string result;
  std::vector<uint32_t> codes;
  while (!text.empty()) {
    const Utf8Step step = nextUtf8(text);
    text.remove_prefix(step.size);
    codes.clear();
    if (!lower().append(step.code, codes)) codes.push_back(step.code);
    for (const uint32_t code : codes) appendUtf8(result, code);
  }
  return result;
}

}  // namespace sinkrt
