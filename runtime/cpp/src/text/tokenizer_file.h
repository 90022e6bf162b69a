// What the readers of a tokenizer.json's parts share. A part that is not wholly understood is refused.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "bundle/json.h"

namespace sinkrt {

class TokenizerFile {
 public:
  explicit TokenizerFile(std::string name) : name_(std::move(name)) {}

  // Throws Error(kBundle), as all others do.
  [[noreturn]] void refuse(const std::string& received, const std::string& expected) const;

  // A part's type, e.g. "ByteLevel"; "" for null.
  std::string typeOf(const Json& part) const;
  const Json& need(const Json& object, const char* key) const;
  const std::string& needText(const Json& object, const char* key) const;
  int64_t needId(const Json& value) const;
  // A number of things that a part counts: 0 .. 2^24 - 1.
  size_t needCount(const Json& object, const char* key) const;
  // A switch, and what it is where it is left out.
  bool flag(const Json& object, const char* key, bool otherwise) const;
  // Refuses members that are none of these: options of newer libraries, which would be ignored.
  void checkMembers(const Json& part, std::initializer_list<const char*> known) const;
  // The only character of a text.
  uint32_t needCharacter(const Json& object, const char* key) const;

  // Items of a "Sequence", or the part itself; none for null. key: where a sequence has them.
  std::vector<const Json*> flattened(const Json& part, const char* key, int depth = 0) const;

 private:
  std::string name_;
};

}  // namespace sinkrt
