// What belongs to one character on the screen: extended grapheme clusters (Unicode 17, UAX 29).
#include <algorithm>
#include <iterator>

#include "text/unicode.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

#include "text/grapheme_tables.inc"

// In the order of make_unicode_tables.py; the two of Hangul's syllables are computed.
enum Break : uint32_t {
  kAny,
  kCr,
  kLf,
  kControl,
  kExtend,
  kJoiner,
  kSpacingMark,
  kPrepend,
  kLead,
  kVowel,
  kTail,
  kRegional,
  kPictographic,
  kConsonant,
  kLeadVowel,
  kLeadVowelTail
};
constexpr uint32_t kBreaks = 15, kConjunctExtend = 1 << 4, kConjunctLinker = 1 << 5;

uint32_t joins(uint32_t code) {
  constexpr uint32_t kSyllable = 0xac00, kNumSyllables = 11172, kNumTails = 28;
  if (code - kSyllable < kNumSyllables) return (code - kSyllable) % kNumTails == 0 ? kLeadVowel : kLeadVowelTail;
  const uint32_t* after = std::upper_bound(std::begin(kGraphemes), std::end(kGraphemes), code << 6 | 0x3f);
  return after[-1] & 0x3f;
}

bool isBreak(uint32_t cls) {
  return cls == kCr || cls == kLf || cls == kControl;
}

// What stands before a place inside a cluster, as far as it counts.
struct Before {
  uint32_t cls;
  size_t regionals;      // in a row
  bool after_picture;    // a pictograph and marks, whatever follows
  bool after_consonant;  // a consonant and marks of conjuncts
  bool has_linker;       // one of those marks links

  explicit Before(uint32_t first) { take(first, true); }

  void take(uint32_t flags, bool is_first = false) {
    const uint32_t next = flags & kBreaks;
    regionals = next == kRegional ? (is_first ? 1 : regionals + 1) : 0;
    // The joiner keeps the pictograph for one more character.
    after_picture =
        next == kPictographic || (!is_first && after_picture && cls != kJoiner && (next == kExtend || next == kJoiner));
    const bool marks = !is_first && (flags & (kConjunctExtend | kConjunctLinker)) != 0;
    after_consonant = next == kConsonant || (marks && after_consonant);
    has_linker = marks && after_consonant && (has_linker || (flags & kConjunctLinker) != 0);
    cls = next;
  }

  bool joins(uint32_t next) const {
    if (cls == kCr && next == kLf) return true;
    if (isBreak(cls) || isBreak(next)) return false;
    if (cls == kLead && (next == kLead || next == kVowel || next == kLeadVowel || next == kLeadVowelTail)) return true;
    if ((cls == kLeadVowel || cls == kVowel) && (next == kVowel || next == kTail)) return true;
    if ((cls == kLeadVowelTail || cls == kTail) && next == kTail) return true;
    if (next == kExtend || next == kJoiner || next == kSpacingMark || cls == kPrepend) return true;
    if (next == kConsonant) return after_consonant && has_linker;
    if (cls == kJoiner && next == kPictographic) return after_picture;
    return cls == kRegional && next == kRegional && regionals % 2 == 1;
  }
};

}  // namespace

size_t clusterSize(std::string_view text) {
  const Utf8Step first = nextUtf8(text);
  Before before(joins(first.code));
  size_t size = first.size;
  while (size < text.size()) {
    const Utf8Step next = nextUtf8(text.substr(size));
    const uint32_t flags = joins(next.code);
    if (!before.joins(flags & kBreaks)) break;
    before.take(flags);
    size += next.size;
  }
  return size;
}

}  // namespace sinkrt
