#include "text/pattern.h"

#include <algorithm>
#include <limits>

#include "text/unicode.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

using Set = Pattern::Set;
using Item = Pattern::Item;
using Kind = Pattern::Kind;
using Sequence = Pattern::Sequence;
using Alternatives = Pattern::Alternatives;

constexpr uint32_t kEndless = std::numeric_limits<uint32_t>::max();
// Groups are matched recursively, so they repeat a few times at most; single characters repeat without end, and groups
// of a fixed number of them.
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
        if (!has(sequence[i], pair[0]) || !has(sequence[i + 1], pair[1])) continue;
        fail("a (?i:..) with '" + std::string(pair) + "'");
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

  // Whether a group is a fixed number of characters, so that it can be repeated without going deeper each time.
  static bool isFixed(const Item& group) {
    if (group.inner.size() != 1 || group.inner[0].empty()) return false;
    const Sequence& sequence = group.inner[0];
    return std::all_of(sequence.begin(), sequence.end(), [](const Item& item) {
      return item.kind == Kind::kSet && item.least == item.most && item.least > 0;
    });
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
    if (item.kind == Kind::kGroup && item.most > kMostGroups) {
      if (!isFixed(item)) fail("a group that repeats without end");
      item.fixed = true;
    }
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

}  // namespace

Pattern::Pattern(std::string_view source) : alternatives_(Compiler(source).compile()) {}

}  // namespace sinkrt
