#include "fields.h"

#include <cstring>

namespace sinkexport::trt {
namespace {

constexpr size_t kValueBytes = 4;

std::string quoted(const char* name) {
  return std::string("field '") + (name != nullptr ? name : "") + "': ";
}

// Sets one field. "" or what is wrong with the value.
std::string setField(const Field& field, const nvinfer1::PluginField& given) {
  if (given.data == nullptr || given.length != 1) {
    return "received " + std::to_string(given.length) + " values, expected one";
  }
  if (given.type == field.type) {
    std::memcpy(field.value, given.data, kValueBytes);
    return "";
  }
#if NV_TENSORRT_MAJOR >= 10
  if (field.type == nvinfer1::PluginFieldType::kINT32 && given.type == nvinfer1::PluginFieldType::kINT64) {
    int64_t wide = 0;
    std::memcpy(&wide, given.data, sizeof wide);
    if (wide < INT32_MIN || wide > INT32_MAX) return "received " + std::to_string(wide) + ", expected an int32";
    const auto narrow = static_cast<int32_t>(wide);
    std::memcpy(field.value, &narrow, kValueBytes);
    return "";
  }
#endif
  return std::string("received another type, expected ") +
         (field.type == nvinfer1::PluginFieldType::kINT32 ? "an int32" : "a float32");
}

}  // namespace

std::string readFields(const FieldList& fields, const nvinfer1::PluginFieldCollection* given) {
  std::vector<bool> is_set(fields.size(), false);
  for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
    const nvinfer1::PluginField& one = given->fields[i];
    size_t k = 0;
    while (k < fields.size() && (one.name == nullptr || std::strcmp(fields[k].name, one.name) != 0)) ++k;
    if (k == fields.size()) {
      std::string known;
      for (const Field& field : fields) known += (known.empty() ? "" : ", ") + std::string(field.name);
      return quoted(one.name) + "unknown, expected " + known;
    }
    if (is_set[k]) return quoted(one.name) + "received twice, expected once";
    const std::string problem = setField(fields[k], one);
    if (!problem.empty()) return quoted(one.name) + problem;
    is_set[k] = true;
  }
  for (size_t k = 0; k < fields.size(); ++k) {
    if (!is_set[k]) return quoted(fields[k].name) + "missing, expected every field";
  }
  return "";
}

std::vector<nvinfer1::PluginField> asPluginFields(const FieldList& fields) {
  std::vector<nvinfer1::PluginField> result;
  for (const Field& field : fields) result.emplace_back(field.name, field.value, field.type, 1);
  return result;
}

FieldNames::FieldNames(const FieldList& list) : fields(asPluginFields(list)) {
  for (nvinfer1::PluginField& field : fields) field.data = nullptr;
  collection = {static_cast<int32_t>(fields.size()), fields.data()};
}

size_t serializedBytes(const FieldList& fields) {
  return fields.size() * kValueBytes;
}

void serialize(const FieldList& fields, void* buffer) {
  auto* target = static_cast<char*>(buffer);
  for (const Field& field : fields) {
    std::memcpy(target, field.value, kValueBytes);
    target += kValueBytes;
  }
}

std::string deserialize(const FieldList& fields, const void* data, size_t num_bytes) {
  if (data == nullptr || num_bytes != serializedBytes(fields)) {
    return "stored fields: received " + std::to_string(num_bytes) + " bytes, expected " +
           std::to_string(serializedBytes(fields)) + "; the engine was built with another version of the plugin";
  }
  const auto* source = static_cast<const char*>(data);
  for (const Field& field : fields) {
    std::memcpy(field.value, source, kValueBytes);
    source += kValueBytes;
  }
  return "";
}

}  // namespace sinkexport::trt
