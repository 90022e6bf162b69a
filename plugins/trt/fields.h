// A plugin's fields: the scalars that an ONNX node carries as attributes and an engine stores.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sinkexport::trt {

// Where a field's value lives: one int32 or one float32, both 4 bytes.
struct Field {
  const char* name;
  nvinfer1::PluginFieldType type;  // kINT32 or kFLOAT32
  void* value;

  Field(const char* name_, int32_t* value_) : name(name_), type(nvinfer1::PluginFieldType::kINT32), value(value_) {}
  Field(const char* name_, float* value_) : name(name_), type(nvinfer1::PluginFieldType::kFLOAT32), value(value_) {}
};

using FieldList = std::vector<Field>;

// Sets every field from the collection. Returns "", or one line that names a field that is unknown, missing, given
// twice or not a number of its type; then some may be set already. A null collection is an empty one.
std::string readFields(const FieldList& fields, const nvinfer1::PluginFieldCollection* given);

// The same fields as TensorRT wants to see them; they point at the values.
std::vector<nvinfer1::PluginField> asPluginFields(const FieldList& fields);

// Names and types of fields, without values: what a creator reports. Not to be moved: the collection points inside.
struct FieldNames {
  std::vector<nvinfer1::PluginField> fields;
  nvinfer1::PluginFieldCollection collection;

  explicit FieldNames(const FieldList& list);
  FieldNames(const FieldNames&) = delete;
  FieldNames& operator=(const FieldNames&) = delete;
};

// 4 bytes a field in the list's order, little-endian as all platforms of TensorRT are.
size_t serializedBytes(const FieldList& fields);
void serialize(const FieldList& fields, void* buffer);
// Returns "", or one line if the length is wrong.
std::string deserialize(const FieldList& fields, const void* data, size_t num_bytes);

}  // namespace sinkexport::trt
