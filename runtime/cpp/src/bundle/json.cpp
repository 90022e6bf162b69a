#include "bundle/json.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "text/utf8.h"

namespace sinkrt {
namespace {

constexpr int kMaxDepth = 64;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse(0);
    space();
    if (at_ != text_.size()) fail("more text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw JsonError(what + " at byte " + std::to_string(at_)); }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void space() {
    while (at_ < text_.size() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) ++at_;
  }

  void expect(char c) {
    if (at_ == text_.size() || text_[at_] != c) fail(std::string("expected '") + c + "'");
    ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse(int depth) {
    if (depth > kMaxDepth) fail("nested too deeply");
    space();
    Json value;
    switch (peek()) {
      case '{':
        object(value, depth);
        break;
      case '[':
        array(value, depth);
        break;
      case '"':
        value.type = Json::Type::kString;
        value.text = string();
        break;
      case 't':
      case 'f':
        value.type = Json::Type::kBool;
        value.boolean = take("true");
        if (!value.boolean && !take("false")) fail("expected a value");
        break;
      case 'n':
        if (!take("null")) fail("expected a value");
        break;
      default:
        number(value);
    }
    return value;
  }

  void object(Json& value, int depth) {
    value.type = Json::Type::kObject;
    expect('{');
    space();
    if (peek() == '}') {
      ++at_;
      return;
    }
    while (true) {
      space();
      std::string key = string();
      space();
      expect(':');
      value.members.emplace_back(std::move(key), parse(depth + 1));
      space();
      if (peek() == '}') break;
      expect(',');
    }
    ++at_;
    std::vector<const std::string*> keys;
    keys.reserve(value.members.size());
    for (const auto& member : value.members) keys.push_back(&member.first);
    std::sort(keys.begin(), keys.end(), [](const auto* a, const auto* b) { return *a < *b; });
    const auto equal = [](const auto* a, const auto* b) { return *a == *b; };
    const auto twice = std::adjacent_find(keys.begin(), keys.end(), equal);
    if (twice != keys.end()) fail("key " + jsonQuoted(**twice) + " twice in the object that ends");
  }

  void array(Json& value, int depth) {
    value.type = Json::Type::kArray;
    expect('[');
    space();
    if (peek() == ']') {
      ++at_;
      return;
    }
    while (true) {
      value.items.push_back(parse(depth + 1));
      space();
      if (peek() == ']') break;
      expect(',');
    }
    ++at_;
  }

  std::string string() {
    expect('"');
    std::string out;
    while (true) {
      if (at_ == text_.size()) fail("a string without an end");
      const auto c = static_cast<uint8_t>(text_[at_]);
      if (c == '"') break;
      if (c < 0x20) fail("a control character in a string");
      if (c == '\\') {
        escape(out);
        continue;
      }
      const Utf8Step step = nextUtf8(text_.substr(at_));
      if (!step.valid) fail("a string that is not UTF-8");
      out.append(text_.substr(at_, step.size));
      at_ += step.size;
    }
    ++at_;
    return out;
  }

  void escape(std::string& out) {
    ++at_;
    const char c = peek();
    ++at_;
    switch (c) {
      case '"':
      case '\\':
      case '/':
        out += c;
        return;
      case 'b':
        out += '\b';
        return;
      case 'f':
        out += '\f';
        return;
      case 'n':
        out += '\n';
        return;
      case 'r':
        out += '\r';
        return;
      case 't':
        out += '\t';
        return;
      case 'u':
        break;
      default:
        --at_;
        fail("an unknown escape");
    }
    uint32_t code = hex4();
    if (code >= 0xdc00 && code < 0xe000) fail("a lone surrogate");
    if (code >= 0xd800 && code < 0xdc00) {
      if (!take("\\u")) fail("a lone surrogate");
      const uint32_t low = hex4();
      if (low < 0xdc00 || low >= 0xe000) fail("a lone surrogate");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    appendUtf8(out, code);
  }

  uint32_t hex4() {
    uint32_t code = 0;
    const std::string_view digits = text_.substr(std::min(at_, text_.size()), 4);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (error != std::errc() || digits.size() != 4 || end != digits.data() + 4) fail("expected four hex digits");
    at_ += 4;
    return code;
  }

  void digits() {
    if (peek() < '0' || peek() > '9') fail("expected a value");
    while (peek() >= '0' && peek() <= '9') ++at_;
  }

  void number(Json& value) {
    const size_t start = at_;
    bool whole = true;
    if (peek() == '-') ++at_;
    if (peek() == '0') {
      ++at_;
    } else {
      digits();
    }
    if (peek() == '.') {
      whole = false;
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    const std::string_view text = text_.substr(start, at_ - start);
    if (whole) {
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value.integer);
      if (error == std::errc() && end == text.data() + text.size()) {
        value.type = Json::Type::kInt;
        return;
      }
    }
    value.type = Json::Type::kFloat;
    value.text = text;
    value.number = std::strtod(std::string(text).c_str(), nullptr);  // GCC 10 has no from_chars of double
    if (!std::isfinite(value.number)) fail("a number that is too large");
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (const auto& [name, value] : members) {
    if (name == key) return &value;
  }
  return nullptr;
}

Json parseJson(std::string_view text) {
  return Parser(text).document();
}

std::string jsonQuoted(std::string_view text) {
  static const char* const kHex = "0123456789abcdef";
  std::string out = "\"";
  const auto unit = [&](uint32_t code) {
    out += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out += kHex[code >> shift & 0xf];
  };
  while (!text.empty()) {
    const Utf8Step step = nextUtf8(text);
    text.remove_prefix(step.size);
    const uint32_t code = step.valid ? step.code : 0xfffd;
    if (code == '"' || code == '\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == '\n') {
      out += "\\n";
    } else if (code == '\r') {
      out += "\\r";
    } else if (code == '\t') {
      out += "\\t";
    } else if (code == '\b') {
      out += "\\b";
    } else if (code == '\f') {
      out += "\\f";
    } else if (code >= 0x20 && code < 0x7f) {
      out += static_cast<char>(code);
    } else if (code < 0x10000) {
      unit(code);
    } else {
      unit(0xd800 + ((code - 0x10000) >> 10));
      unit(0xdc00 + ((code - 0x10000) & 0x3ff));
    }
  }
  return out + '"';
}

}  // namespace sinkrt
