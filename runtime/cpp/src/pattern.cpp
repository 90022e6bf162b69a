#include "pattern.h"

#include <algorithm>
#include <limits>

#include "unicode.h"
#include "utf8.h"

namespace sinkrt {
namespace {

using Set = Pattern::Set;
using Item = Pattern::Item;
using Kind = Pattern::Kind;
using Sequence = Pattern::Sequence;
using Alternatives = Pattern::Alternatives;

constexpr uint32_t kEndless = std::numeric_limits<uint32_t>::max();
// Groups are matched recursively, so they repeat a few times at most; single characters repeat without end.
constexpr uint32_t kMostGroups = 16;
constexpr int kMaxDepth = 16;

class Compiler {
 public:
  explicit Compiler(std::string_view source) : rest_(source), source_(source) {}

  Alternatives compile() {
    Alternatives out = alternatives(false, 0);
    if (!rest_.empty()) fail("a ')' without '('");
    if (mayBeEmpty(out)) fail("a match of nothing");
    return out;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw PatternError(what + " in " + std::string(source_.substr(0, 80)));
  }

  bool take(std::string_view word) {
    if (rest_.substr(0, word.size()) != word) return false;
    rest_.remove_prefix(word.size());
    return true;
  }

  uint32_t next() {
    if (rest_.empty()) fail("an end too early");
    const Utf8Step step = nextUtf8(rest_);
    if (!step.valid) fail("bytes that are not UTF-8");
    rest_.remove_prefix(step.size);
    return step.code;
  }

  static bool mayBeEmpty(const Alternatives& alternatives) {
    return std::any_of(alternatives.begin(), alternatives.end(), [](const Sequence& sequence) {
      return std::all_of(sequence.begin(), sequence.end(), [](const Item& item) {
        if (item.kind == Kind::kSet) return item.least == 0;
        return item.kind != Kind::kGroup || item.least == 0 || mayBeEmpty(item.inner);
      });
    });
  }

  // Only ASCII's letters are known without regard to case.
  void checkFolded(const Set& set) const {
    const bool plain = std::all_of(set.ranges.begin(), set.ranges.end(), [](const auto& r) { return r.second < 0x80; });
    if (!plain || set.categories != 0) fail("a (?i:..) with more than ASCII");
    for (const Set& inner : set.inner) checkFolded(inner);
  }

  // Without regard to case, one character may be two: 's' 's' is the German sharp s too, 'f' 'i' a ligature.
  void checkFolds(const Sequence& sequence) const {
    const auto has = [](const Item& item, char letter) {
      if (item.kind != Kind::kSet || !item.set.folded || item.set.ranges.size() != 1) return false;
      return item.set.ranges[0].first == item.set.ranges[0].second && item.set.ascii[static_cast<uint8_t>(letter)];
    };
    for (size_t i = 0; i + 1 < sequence.size(); ++i) {
      for (const char* pair : {"ss", "st", "ff", "fi", "fl"}) {
        if (has(sequence[i], pair[0]) && has(sequence[i + 1], pair[1])) fail("a (?i:..) with '" + std::string(pair) + "'");
      }
    }
  }

  Alternatives alternatives(bool folded, int depth) {
    if (depth > kMaxDepth) fail("groups nested too deeply");
    Alternatives out(1);
    while (!rest_.empty() && rest_[0] != ')') {
      if (take("|")) {
        out.emplace_back();
      } else {
        out.back().push_back(item(folded, depth));
      }
    }
    for (const Sequence& sequence : out) checkFolds(sequence);
    return out;
  }

  Item item(bool folded, int depth) {
    Item out;
    if (take("(")) {
      bool inner_folded = folded;
      out.kind = Kind::kGroup;
      if (take("?!")) {
        out.kind = Kind::kNotAhead;
      } else if (take("?=")) {
        out.kind = Kind::kAhead;
      } else if (take("?i:")) {
        inner_folded = true;
      } else if (!take("?:") && rest_.substr(0, 1) == "?") {
        fail("an unknown kind of group");
      }
      out.inner = alternatives(inner_folded, depth + 1);
      if (!take(")")) fail("a '(' without ')'");
    } else if (take("$")) {
      out.kind = Kind::kLineEnd;
    } else {
      out.set.folded = folded;
      single(out.set);
      if (folded) checkFolded(out.set);
      out.set.addAscii();
    }
    quantifier(out);
    return out;
  }

  void quantifier(Item& item) {
    const bool simple = rest_.substr(0, 1) != "{";  // a '+' after '}' is a quantifier of its own in Ruby's syntax
    if (take("+")) {
      item.most = kEndless;
    } else if (take("*")) {
      item.least = 0;
      item.most = kEndless;
    } else if (take("?")) {
      item.least = 0;
    } else if (take("{")) {
      item.least = item.most = number();
      if (take(",")) item.most = rest_.substr(0, 1) == "}" ? kEndless : number();
      if (!take("}") || item.most < item.least) fail("an odd quantifier");
    } else {
      return;
    }
    if (simple && item.kind == Kind::kSet && take("+")) item.possessive = true;
    if (rest_.substr(0, 1) == "?" || rest_.substr(0, 1) == "+" || rest_.substr(0, 1) == "*") {
      fail("a lazy, possessive or double quantifier");
    }
    if (item.kind != Kind::kSet && item.kind != Kind::kGroup) fail("a repeated lookahead or '$'");
    if (item.kind == Kind::kGroup && item.most > kMostGroups) fail("a group that repeats without end");
  }

  uint32_t number() {
    uint32_t value = 0;
    size_t digits = 0;
    for (; digits < rest_.size() && rest_[digits] >= '0' && rest_[digits] <= '9' && digits < 4; ++digits) {
      value = value * 10 + static_cast<uint32_t>(rest_[digits] - '0');
    }
    if (digits == 0) fail("an odd quantifier");
    rest_.remove_prefix(digits);
    return value;
  }

  void single(Set& set) {
    if (take("[")) {
      characters(set);
    } else if (take(".")) {
      set.negated = true;
      set.ranges.emplace_back('\n', '\n');
    } else if (take("\\")) {
      escape(set, false);
    } else {
      const uint32_t code = next();
      if (code == '^' || code == '$' || code == '*' || code == '+' || code == '?' || code == '{') {
        fail(std::string("a '") + static_cast<char>(code) + "' that is not escaped");
      }
      set.ranges.emplace_back(code, code);
    }
  }

  void characters(Set& set) {
    set.negated = take("^");
    for (bool first = true; first || rest_.substr(0, 1) != "]"; first = false) {
      if (rest_.substr(0, 2) == "&&") fail("an intersection of classes");
      if (rest_.substr(0, 2) == "[:") fail("a POSIX class");
      if (take("[")) {
        if (++depth_ > kMaxDepth) fail("classes nested too deeply");
        Set inner;
        inner.folded = set.folded;
        characters(inner);
        inner.addAscii();
        set.inner.push_back(std::move(inner));
        --depth_;
        continue;
      }
      if (take("\\")) {
        const size_t before = set.ranges.size();
        escape(set, true);
        if (set.ranges.size() == before) continue;  // a class of its own
      } else {
        const uint32_t code = next();
        set.ranges.emplace_back(code, code);
      }
      if (rest_.size() > 1 && rest_[0] == '-' && rest_[1] != ']') {
        take("-");
        Set end;
        if (take("\\")) {
          escape(end, true);
        } else {
          const uint32_t code = next();
          end.ranges.emplace_back(code, code);
        }
        if (end.ranges.size() != 1 || end.ranges[0].first < set.ranges.back().first) fail("an odd range");
        set.ranges.back().second = end.ranges[0].first;
      }
    }
    take("]");
  }

  void escape(Set& set, bool in_class) {
    const uint32_t code = next();
    const auto literal = [&](uint32_t meant) { set.ranges.emplace_back(meant, meant); };
    switch (code) {
      case 'n':
        return literal('\n');
      case 'r':
        return literal('\r');
      case 't':
        return literal('\t');
      case 'f':
        return literal('\f');
      case 'v':
        return literal('\v');
      case 's':
        set.space = true;
        return;
      case 'S':
        set.not_space = true;
        return;
      case 'd':
        set.categories |= categoryMask("Nd");
        return;
      case 'D':
        set.categories |= ~categoryMask("Nd");
        return;
      case 'w':
        (in_class ? set.class_word : set.word) = true;
        return;
      case 'W':
        (in_class ? set.class_not_word : set.not_word) = true;
        return;
      case 'p':
      case 'P': {
        const size_t end = rest_.find('}');
        if (!take("{") || end == std::string_view::npos) fail("an odd \\p");
        const bool negated = take("^") != (code == 'P');
        const std::string_view name = rest_.substr(0, rest_.find('}'));
        rest_.remove_prefix(name.size() + 1);
        const uint32_t mask = categoryMask(name);
        if (mask == 0) fail("the unknown property " + std::string(name));
        set.categories |= negated ? ~mask : mask;
        return;
      }
      default:
        if (code < 0x80 && ((code | 0x20) - 'a' < 26 || code - '0' < 10)) {
          fail(std::string("the unknown escape \\") + static_cast<char>(code));
        }
        literal(code);
    }
  }

  std::string_view rest_, source_;
  int depth_ = 0;  // of classes inside classes
};

// A continuation that is never kept.
class Next {
 public:
  template <typename Callable>
  Next(const Callable& callable)  // NOLINT: implicit, as function arguments are
      : object_(&callable), call_([](const void* object, size_t at) {
          return (*static_cast<const Callable*>(object))(at);
        }) {}
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
        return groups(item, 0, at, rest);
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

  bool groups(const Item& item, uint32_t count, size_t at, const Next& next) const {
    const auto again = [&](size_t end) { return end != at && groups(item, count + 1, end, next); };
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

Pattern::Pattern(std::string_view source) : alternatives_(Compiler(source).compile()) {}

int64_t Pattern::match(std::string_view text, size_t start) const {
  size_t end = start;
  const auto reached = [&](size_t at) {
    end = at;
    return true;
  };
  return Matcher(text).any(alternatives_, start, reached) ? static_cast<int64_t>(end - start) : -1;
}

}  // namespace sinkrt
