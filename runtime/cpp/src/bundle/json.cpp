#include "bundle/json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

// CMakeLists.txt hides this file's symbols: a program may have another release of the library.
#define JSON_NO_IO 1
#define JSON_USE_IMPLICIT_CONVERSIONS 0
#define JSON_HAS_FILESYSTEM 0
#include <nlohmann/json.hpp>

namespace sinkrt {
namespace {

constexpr size_t kMaxDepth = 64;
constexpr size_t kMostShown = 200;  // characters of a message: the library quotes what it read last

// Builds values of the parser's events, and refuses what the library takes.
class Builder {
 public:
  using Library = nlohmann::json;

  explicit Builder(Json& root) : root_(root) {}

  bool null() {
    place();
    return true;
  }
  bool boolean(bool value) {
    place() = toJson(value);
    return true;
  }
  bool number_integer(int64_t value) {
    place() = toJson(value);
    return true;
  }
  bool number_unsigned(uint64_t value) {
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return number_float(static_cast<double>(value), std::to_string(value));
    }
    return number_integer(static_cast<int64_t>(value));
  }
  bool number_float(double value, const std::string& digits) {
    Json& out = place();
    out = toJson(value);
    out.text = digits;
    return true;
  }
  bool string(std::string& value) {
    place() = toJson(std::move(value));
    return true;
  }
  bool key(std::string& value) {
    open_.back()->members.emplace_back(std::move(value), Json());
    return true;
  }
  bool start_object(size_t) { return start(Json::Type::kObject); }
  bool start_array(size_t) { return start(Json::Type::kArray); }
  bool end_array() {
    open_.pop_back();
    return true;
  }
  bool end_object() {
    checkKeys(open_.back()->members);
    return end_array();
  }
  bool binary(Library::binary_t&) { return false; }  // JSON's text has none
  [[noreturn]] bool parse_error(size_t, const std::string&, const Library::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    std::string text = error.what();
    text.erase(0, text.find("] ") + 2);
    if (text.size() > kMostShown) text = text.substr(0, kMostShown) + "..";
    throw JsonError(text);
  }

 private:
  // Where the value that comes next belongs. It stays there until its container is closed: only the last one grows.
  Json& place() {
    if (open_.size() > kMaxDepth) throw JsonError("nested too deeply");
    if (open_.empty()) return root_;
    Json& parent = *open_.back();
    return parent.isObject() ? parent.members.back().second : parent.items.emplace_back();
  }

  bool start(Json::Type type) {
    Json& out = place();
    out.type = type;
    open_.push_back(&out);
    return true;
  }

  static void checkKeys(const std::vector<Json::Member>& members) {
    std::vector<const std::string*> keys;
    keys.reserve(members.size());
    for (const auto& member : members) keys.push_back(&member.first);
    std::sort(keys.begin(), keys.end(), [](const auto* a, const auto* b) { return *a < *b; });
    const auto equal = [](const auto* a, const auto* b) { return *a == *b; };
    const auto twice = std::adjacent_find(keys.begin(), keys.end(), equal);
    if (twice == keys.end()) return;
    throw JsonError("key " + dumpJson(toJson((*twice)->substr(0, kMostShown))) + " twice in an object");
  }

  Json& root_;
  std::vector<Json*> open_;  // containers that are not closed yet, the outermost first
};

std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

// A number as Python's repr writes it: the fewest digits that give it back, with an exponent below 1e-4 and from 1e16.
std::string shortest(double value) {
  char text[40];
  for (int digits = 1; digits <= 17; ++digits) {
    std::snprintf(text, sizeof text, "%.*e", digits - 1, value);
    if (std::strtod(text, nullptr) == value) break;
  }
  const std::string found = text;
  const size_t mark = found.find('e');
  const int exponent = std::atoi(found.c_str() + mark + 1);
  std::string digits;
  for (const char c : found.substr(0, mark)) {
    if (c >= '0' && c <= '9') digits += c;
  }
  const std::string sign = std::signbit(value) ? "-" : "";
  if (exponent < -4 || exponent >= 16) {
    char power[8];
    std::snprintf(power, sizeof power, "e%+03d", exponent);
    return sign + digits.substr(0, 1) + (digits.size() > 1 ? "." + digits.substr(1) : "") + power;
  }
  if (exponent < 0) return sign + "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + digits;
  const auto whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() < whole) digits.append(whole - digits.size(), '0');
  return sign + digits.substr(0, whole) + "." + (digits.size() > whole ? digits.substr(whole) : "0");
}

class Writer {
 public:
  Writer(JsonStyle style, std::string& out) : style_(style), out_(out) {}

  void write(const Json& value) {
    switch (value.type) {
      case Json::Type::kNull:
        out_ += "null";
        break;
      case Json::Type::kBool:
        out_ += value.boolean ? "true" : "false";
        break;
      case Json::Type::kInt:
        out_ += std::to_string(value.integer);
        break;
      case Json::Type::kFloat:
        out_ += shortest(value.number);
        break;
      case Json::Type::kString:
        out_ += quoted(value.text);
        break;
      case Json::Type::kArray:
        list('[', value.items, ']', [this](const Json& item) { write(item); });
        break;
      case Json::Type::kObject:
        object(value.members);
    }
  }

 private:
  void object(const std::vector<Json::Member>& members) {
    std::vector<const Json::Member*> order;
    for (const auto& member : members) order.push_back(&member);
    if (style_.sorted) {  // by bytes of UTF-8, which is by characters
      std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) { return a->first < b->first; });
    }
    list('{', order, '}', [this](const Json::Member* member) {
      out_ += quoted(member->first) + ": ";
      write(member->second);
    });
  }

  template <typename Items, typename Write>
  void list(char open, const Items& items, char close, Write write_item) {
    out_ += open;
    ++level_;
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out_ += style_.indent < 0 ? ", " : ",";
      newLine();
      write_item(items[i]);
    }
    --level_;
    if (!items.empty()) newLine();
    out_ += close;
  }

  void newLine() {
    if (style_.indent >= 0) out_.append("\n").append(static_cast<size_t>(level_ * style_.indent), ' ');
  }

  const JsonStyle style_;
  std::string& out_;
  int level_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (const auto& [name, value] : members) {
    if (name == key) return &value;
  }
  return nullptr;
}

Json parseJson(std::string_view text) {
  // The library takes a byte order mark for nothing, and a NUL for the end of the text.
  if (text.substr(0, 3) == "\xef\xbb\xbf") throw JsonError("a byte order mark before the value");
  if (text.find('\0') != std::string_view::npos) throw JsonError("a NUL byte");
  Json out;
  Builder builder(out);
  nlohmann::json::sax_parse(text.data(), text.data() + text.size(), &builder);
  return out;
}

std::string dumpJson(const Json& value, JsonStyle style) {
  std::string out;
  Writer(style, out).write(value);
  return out;
}

Json toJson(bool value) {
  Json out;
  out.type = Json::Type::kBool;
  out.boolean = value;
  return out;
}

Json toJson(int64_t value) {
  Json out;
  out.type = Json::Type::kInt;
  out.integer = value;
  return out;
}

Json toJson(double value) {
  Json out;
  out.type = Json::Type::kFloat;
  out.number = value;
  return out;
}

Json toJson(std::string value) {
  Json out;
  out.type = Json::Type::kString;
  out.text = std::move(value);
  return out;
}

Json toJson(const char* value) {
  return toJson(std::string(value));
}

}  // namespace sinkrt
