// JSON as RFC 8259 has it, and stricter: UTF-8 only, no key twice, no lone surrogates, nesting up to 64 levels.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sinkrt {

// Malformed text: what is wrong and at which byte.
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
  std::string text;             // kString; kFloat: the digits as they stand there
  std::vector<Json> items;      // kArray
  std::vector<Member> members;  // kObject, in the text's order

  bool isNull() const { return type == Type::kNull; }
  bool isString() const { return type == Type::kString; }
  bool isArray() const { return type == Type::kArray; }
  bool isObject() const { return type == Type::kObject; }
  // The member of an object by its key, or nullptr.
  const Json* find(std::string_view key) const;
};

// Throws JsonError.
Json parseJson(std::string_view text);

// A string literal as Python's json.dumps writes it: ASCII only. `text` is UTF-8.
std::string jsonQuoted(std::string_view text);

}  // namespace sinkrt
