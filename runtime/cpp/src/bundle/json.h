// JSON values, read and written by nlohmann/json, which json.cpp alone includes. Stricter than RFC 8259: UTF-8 only, no
// key twice, no lone surrogates, nesting up to 64 levels, no number beyond a double's range.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sinkrt {

// Malformed text: what is wrong, and where if the place is known.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Json {
  enum class Type : uint8_t { kNull, kBool, kInt, kFloat, kString, kArray, kObject };
  using Member = std::pair<std::string, Json>;

  Type type = Type::kNull;
  bool boolean = false;
  int64_t integer = 0;          // kInt: numbers without fraction and exponent that fit; others are kFloat
  double number = 0;            // kFloat
  std::string text;             // kString; kFloat that was read: the digits as they stand there
  std::vector<Json> items;      // kArray
  std::vector<Member> members;  // kObject, in the text's order

  static Json object() {
    Json out;
    out.type = Type::kObject;
    return out;
  }
  // Append a member to an object.
  void add(std::string key, Json value) { members.emplace_back(std::move(key), std::move(value)); }

  bool isNull() const { return type == Type::kNull; }
  bool isString() const { return type == Type::kString; }
  bool isArray() const { return type == Type::kArray; }
  bool isObject() const { return type == Type::kObject; }
  // The member of an object by its key, or nullptr.
  const Json* find(std::string_view key) const;
};

// Throws JsonError.
Json parseJson(std::string_view text);

// How text is laid out. indent: spaces a level; -1: all on one line. sorted: members by their keys.
struct JsonStyle {
  int indent = -1;
  bool sorted = false;
};

// The text that Python's json.dumps writes with the same indent and sort_keys, byte for byte: ASCII only. Bytes that
// are not UTF-8 become U+FFFD.
std::string dumpJson(const Json& value, JsonStyle style = {});

Json toJson(bool value);
Json toJson(int64_t value);
Json toJson(double value);
Json toJson(std::string value);
Json toJson(const char* value);  // not a bool

}  // namespace sinkrt
