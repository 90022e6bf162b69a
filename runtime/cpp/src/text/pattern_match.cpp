// What a compiled pattern matches.
#include "text/pattern.h"

#include <algorithm>

#include "text/unicode.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

using Set = Pattern::Set;
using Item = Pattern::Item;
using Kind = Pattern::Kind;
using Sequence = Pattern::Sequence;
using Alternatives = Pattern::Alternatives;

// A continuation that is never kept.
class Next {
 public:
  template <typename Callable>
  Next(const Callable& callable)  // NOLINT: implicit, as function arguments are
      : object_(&callable),
        call_([](const void* object, size_t at) { return (*static_cast<const Callable*>(object))(at); }) {}
  bool operator()(size_t at) const { return call_(object_, at); }

 private:
  const void* object_;
  bool (*call_)(const void*, size_t);
};

class Matcher {
 public:
  explicit Matcher(std::string_view text) : text_(text) {}

  bool any(const Alternatives& alternatives, size_t at, const Next& next) const {
    return std::any_of(alternatives.begin(), alternatives.end(),
                       [&](const Sequence& sequence) { return all(sequence, 0, at, next); });
  }

 private:
  bool all(const Sequence& sequence, size_t index, size_t at, const Next& next) const {
    if (index == sequence.size()) return next(at);
    const Item& item = sequence[index];
    const auto rest = [&](size_t end) { return all(sequence, index + 1, end, next); };
    const auto yes = [](size_t) { return true; };
    switch (item.kind) {
      case Kind::kAhead:
        return any(item.inner, at, yes) && rest(at);
      case Kind::kNotAhead:
        return !any(item.inner, at, yes) && rest(at);
      case Kind::kLineEnd:
        return (at == text_.size() || text_[at] == '\n') && rest(at);
      case Kind::kGroup:
        return item.fixed ? fixedGroups(item, at, rest) : groups(item, 0, at, rest);
      case Kind::kSet:
        break;
    }
    uint32_t count = 0;
    size_t end = at;
    while (count < item.most && end < text_.size()) {
      const Utf8Step step = nextUtf8(text_.substr(end));
      if (!item.set.has(step.code)) break;
      end += step.size;
      ++count;
    }
    if (item.possessive) return count >= item.least && rest(end);
    while (count >= item.least) {
      if (rest(end)) return true;
      if (count == 0) return false;
      --count;
      do --end;
      while ((static_cast<uint8_t>(text_[end]) & 0xc0) == 0x80);
    }
    return false;
  }

  // Where a fixed group that begins at `at` ends; -1: it does not match.
  int64_t groupEnd(const Item& item, size_t at) const {
    for (const Item& part : item.inner[0]) {
      for (uint32_t i = 0; i < part.least; ++i) {
        if (at >= text_.size()) return -1;
        const Utf8Step step = nextUtf8(text_.substr(at));
        if (!part.set.has(step.code)) return -1;
        at += step.size;
      }
    }
    return static_cast<int64_t>(at);
  }

  // The most groups first, as `groups`.
  bool fixedGroups(const Item& item, size_t at, const Next& next) const {
    uint32_t count = 0;
    size_t end = at;
    for (int64_t more; count < item.most && (more = groupEnd(item, end)) >= 0; ++count) end = static_cast<size_t>(more);
    uint32_t width = 0;  // of one, in characters
    for (const Item& part : item.inner[0]) width += part.least;
    while (count >= item.least) {
      if (next(end)) return true;
      if (count == 0) return false;
      --count;
      for (uint32_t i = 0; i < width; ++i) {
        do --end;
        while ((static_cast<uint8_t>(text_[end]) & 0xc0) == 0x80);
      }
    }
    return false;
  }

  bool groups(const Item& item, uint32_t count, size_t at, const Next& next) const {
    // A group that matches nothing is not tried again, but it counts.
    const auto again = [&](size_t end) { return end != at ? groups(item, count + 1, end, next) : next(at); };
    if (count < item.most && any(item.inner, at, again)) return true;
    return count >= item.least && next(at);
  }

  std::string_view text_;
};

}  // namespace

bool Set::plainlyHas(uint32_t code) const {
  for (const auto& [first, last] : ranges) {
    if (first <= code && code <= last) return true;
  }
  if (space && isSpace(code)) return true;
  if (not_space && !isSpace(code)) return true;
  if ((word && isWord(code)) || (not_word && !isWord(code))) return true;
  if ((class_word && isClassWord(code)) || (class_not_word && !isClassWord(code))) return true;
  for (const Set& set : inner) {
    if (set.has(code)) return true;
  }
  return categories != 0 && (categoryBit(code) & categories) != 0;
}

bool Set::has(uint32_t code) const {
  if (code < 128) return ascii[code];
  bool found = plainlyHas(code);
  // The two characters outside ASCII whose lower case lies in it: long s and the Kelvin sign.
  if (folded && code == 0x17f) found = found || plainlyHas('s') || plainlyHas('S');
  if (folded && code == 0x212a) found = found || plainlyHas('k') || plainlyHas('K');
  return found != negated;
}

void Set::addAscii() {
  for (uint32_t code = 0; code < 128; ++code) {
    bool found = plainlyHas(code);
    if (folded && (code | 0x20) - 'a' < 26) found = found || plainlyHas(code ^ 0x20);
    ascii[code] = found != negated;
  }
}

int64_t Pattern::match(std::string_view text, size_t start) const {
  size_t end = start;
  const auto reached = [&](size_t at) {
    end = at;
    return true;
  };
  return Matcher(text).any(alternatives_, start, reached) ? static_cast<int64_t>(end - start) : -1;
}

}  // namespace sinkrt
