#include "text/tokenizer_file.h"

#include <algorithm>

#include "sinkrt/error.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

constexpr int64_t kMost = 1 << 24;
constexpr int kMostLevels = 4;

}  // namespace

void TokenizerFile::refuse(const std::string& received, const std::string& expected) const {
  throw Error(Code::kBundle, problem(name_, received, expected, "feed token ids, or use the Python runtime"));
}

std::string TokenizerFile::typeOf(const Json& part) const {
  if (part.isNull()) return "";
  const Json* type = part.find("type");
  if (type == nullptr || !type->isString()) refuse("a part without a type", "a file of the library 'tokenizers'");
  return type->text;
}

const Json& TokenizerFile::need(const Json& object, const char* key) const {
  const Json* value = object.find(key);
  if (value == nullptr) refuse(std::string("no key '") + key + "'", "a file of the library 'tokenizers'");
  return *value;
}

const std::string& TokenizerFile::needText(const Json& object, const char* key) const {
  const Json& value = need(object, key);
  if (!value.isString()) refuse(std::string("a '") + key + "' that is no text", "a string");
  return value.text;
}

int64_t TokenizerFile::needId(const Json& value) const {
  if (value.type != Json::Type::kInt || value.integer < 0 || value.integer >= kMost) {
    refuse("an id that is none", "0 .. 2^24 - 1");
  }
  return value.integer;
}

size_t TokenizerFile::needCount(const Json& object, const char* key) const {
  const Json& value = need(object, key);
  if (value.type != Json::Type::kInt || value.integer < 0 || value.integer >= kMost) {
    refuse(std::string("a '") + key + "' that is no count", "0 .. 2^24 - 1");
  }
  return static_cast<size_t>(value.integer);
}

bool TokenizerFile::flag(const Json& object, const char* key, bool otherwise) const {
  const Json* value = object.find(key);
  if (value == nullptr || value->isNull()) return otherwise;
  if (value->type != Json::Type::kBool) refuse(std::string("a '") + key + "' that is no switch", "true or false");
  return value->boolean;
}

void TokenizerFile::checkMembers(const Json& part, std::initializer_list<const char*> known) const {
  for (const auto& [key, value] : part.members) {
    const auto same = [&key = key](const char* name) { return key == name; };
    if (key != "type" && std::none_of(known.begin(), known.end(), same)) {
      refuse("a " + typeOf(part) + " with the option '" + key.substr(0, 40) + "'", "options that are known");
    }
  }
}

uint32_t TokenizerFile::needCharacter(const Json& object, const char* key) const {
  const std::string& text = needText(object, key);
  if (!text.empty()) {
    const Utf8Step step = nextUtf8(text);
    if (step.valid && step.size == text.size()) return step.code;
  }
  refuse(std::string("a '") + key + "' that is no single character", "one");
}

std::vector<const Json*> TokenizerFile::flattened(const Json& part, const char* key, int depth) const {
  if (part.isNull()) return {};
  if (typeOf(part) != "Sequence") return {&part};
  if (depth > kMostLevels) refuse("sequences nested too deeply", "a few levels");
  checkMembers(part, {key});
  std::vector<const Json*> out;
  for (const Json& item : need(part, key).items) {
    if (item.isNull()) refuse("an empty place in a sequence", "a part");
    for (const Json* inner : flattened(item, key, depth + 1)) out.push_back(inner);
  }
  return out;
}

}  // namespace sinkrt
