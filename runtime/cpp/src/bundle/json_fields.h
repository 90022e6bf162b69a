// Readers and writers of what the manifest's structs are made of; schema.cpp has those of the structs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bundle/checks.h"
#include "bundle/json.h"
#include "sinkrt/error.h"

namespace sinkrt {

// What was found instead, as Python shows it.
inline std::string shown(const Json& value) {
  switch (value.type) {
    case Json::Type::kNull:
      return "NoneType None";
    case Json::Type::kBool:
      return value.boolean ? "bool True" : "bool False";
    case Json::Type::kInt:
      return "int " + std::to_string(value.integer);
    case Json::Type::kFloat:
      return "float " + std::to_string(value.number);
    case Json::Type::kString:
      return ("str '" + value.text + "'").substr(0, 60);
    case Json::Type::kArray:
      return "list";
    case Json::Type::kObject:
      return "dict";
  }
  return "nothing";
}

// Each overload reads one type of the schema, strictly; `where` names the value for messages.
inline void read(const Json& raw, const std::string& where, std::string& out) {
  require(raw.isString(), where, shown(raw), "str");
  out = raw.text;
}

inline void read(const Json& raw, const std::string& where, int64_t& out) {
  require(raw.type == Json::Type::kInt, where, shown(raw), "int");
  out = raw.integer;
}

inline void read(const Json& raw, const std::string& where, double& out) {
  require(raw.type == Json::Type::kInt || raw.type == Json::Type::kFloat, where, shown(raw), "float");
  out = raw.type == Json::Type::kInt ? static_cast<double>(raw.integer) : raw.number;
}

inline void read(const Json& raw, const std::string& where, bool& out) {
  require(raw.type == Json::Type::kBool, where, shown(raw), "bool");
  out = raw.boolean;
}

// A truth value: `std::vector<bool>` has no elements to read into.
inline void read(const Json& raw, const std::string& where, uint8_t& out) {
  require(raw.type == Json::Type::kBool, where, shown(raw), "bool");
  out = raw.boolean ? 1 : 0;
}

template <typename T>
void read(const Json& raw, const std::string& where, std::vector<T>& out);
template <typename T>
void read(const Json& raw, const std::string& where, std::map<std::string, T>& out);

template <typename T>
void read(const Json& raw, const std::string& where, std::optional<T>& out) {
  out.reset();
  if (raw.isNull()) return;
  T value{};
  read(raw, where, value);
  out = std::move(value);
}

template <typename T>
void read(const Json& raw, const std::string& where, std::vector<T>& out) {
  require(raw.isArray(), where, shown(raw), "a list");
  out.clear();
  for (const Json& item : raw.items) {
    const std::string name = where + "[" + std::to_string(out.size()) + "]";  // before the element is there
    read(item, name, out.emplace_back());
  }
}

template <typename T>
void read(const Json& raw, const std::string& where, std::map<std::string, T>& out) {
  require(raw.isObject(), where, shown(raw), "an object");
  out.clear();
  for (const auto& [key, value] : raw.members) read(value, where + "." + key, out[key]);
}

// The fields of an object: none unknown, none missing.
class Fields {
 public:
  Fields(const Json& raw, const std::string& where) : raw_(raw), where_(where) {
    if (!raw.isObject()) refuse(where, shown(raw), "an object", "export again");
  }

  template <typename T>
  Fields& take(const char* name, T& out) {
    return take(name, out, true);
  }
  // One that older schemas do not have.
  template <typename T>
  Fields& takeIfThere(const char* name, T& out) {
    return take(name, out, false);
  }

  // After all fields: the first unknown or missing key is refused before any wrong value is.
  void end() {
    std::set<std::string> unknown;
    for (const auto& member : raw_.members) {
      if (!names_.count(member.first)) unknown.insert(member.first);
    }
    if (!unknown.empty()) {
      std::string all;
      for (const std::string& name : names_) all += (all.empty() ? "" : ", ") + name;
      refuse(where_, "unknown key '" + *unknown.begin() + "'", all, "remove it or export again");
    }
    if (!missing_.empty()) refuse(where_, "no key '" + *missing_.begin() + "'", "every key", "export again");
    if (problem_) throw *problem_;
  }

 private:
  template <typename T>
  Fields& take(const char* name, T& out, bool required) {
    names_.insert(name);
    const Json* value = raw_.find(name);
    if (value == nullptr) {
      if (required) missing_.insert(name);
      return *this;
    }
    try {
      read(*value, where_ + "." + name, out);
    } catch (const Error& error) {
      if (!problem_) problem_ = error;
    }
    return *this;
  }

  const Json& raw_;
  const std::string& where_;
  std::set<std::string> names_, missing_;
  std::optional<Error> problem_;
};

template <typename T>
Json toJson(const std::vector<T>& value);
template <typename T>
Json toJson(const std::map<std::string, T>& value);

inline Json toJson(uint8_t value) {
  return toJson(value != 0);
}

template <typename T>
Json toJson(const std::optional<T>& value) {
  return value ? toJson(*value) : Json();
}

template <typename T>
Json toJson(const std::vector<T>& value) {
  Json out;
  out.type = Json::Type::kArray;
  for (const T& item : value) out.items.push_back(toJson(item));
  return out;
}

template <typename T>
Json toJson(const std::map<std::string, T>& value) {
  Json out = Json::object();
  for (const auto& [key, item] : value) out.add(key, toJson(item));
  return out;
}

}  // namespace sinkrt
