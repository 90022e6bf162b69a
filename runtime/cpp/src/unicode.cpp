#include "unicode.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "utf8.h"

namespace sinkrt {
namespace {

#include "unicode_tables.inc"

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

void decompose(uint32_t code, std::vector<uint32_t>& out) {
  if (code - kSyllable < kNumSyllables) {
    const uint32_t index = code - kSyllable, tail = index % kNumTails;
    out.push_back(kLead + index / (kNumVowels * kNumTails));
    out.push_back(kVowel + index / kNumTails % kNumVowels);
    if (tail != 0) out.push_back(kTail + tail);
    return;
  }
  size_t low = 0, high = std::size(kDecompositions) / 3;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    const uint32_t* triple = kDecompositions + 3 * middle;
    if (triple[0] == code) {
      decompose(triple[1], out);
      if (triple[2] != 0) decompose(triple[2], out);
      return;
    }
    (triple[0] < code ? low : high) = triple[0] < code ? middle + 1 : middle;
  }
  out.push_back(code);
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
  const uint32_t* after = std::upper_bound(std::begin(kNumeric), std::end(kNumeric), code);
  return (after - std::begin(kNumeric)) % 2 == 1;
}

std::string nfc(std::string_view text) {
  std::vector<uint32_t> codes;
  bool plain = true;  // nothing below U+0300 changes
  for (std::string_view rest = text; !rest.empty();) {
    const Utf8Step step = nextUtf8(rest);
    rest.remove_prefix(step.size);
    plain = plain && step.code < 0x300;
    decompose(step.code, codes);
  }
  if (plain) return std::string(text);
  for (size_t start = 0; start < codes.size();) {  // runs of combining characters, by class
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
  std::string result;
  for (const uint32_t code : out) appendUtf8(result, code);
  return result;
}

}  // namespace sinkrt
