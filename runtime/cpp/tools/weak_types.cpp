#include "weak_types.h"

#include <cstdint>
#include <set>
#include <string_view>
#include <vector>

#include "backends/tensorrt/library.h"
#include "sinkrt/error.h"

#if defined(SINKRT_TENSORRT_8)

namespace sinkrt {
namespace {

// The few fields of ONNX's protobuf that hold types (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). A message
// as its fields in order; numbers keep their value, anything else its bytes.
struct Field {
  uint64_t number;  // of the field
  uint64_t value;
  std::string_view bytes;
};

uint64_t varint(std::string_view& data) {
  uint64_t value = 0;
  for (int shift = 0; !data.empty() && shift < 64; shift += 7) {
    const auto byte = static_cast<unsigned char>(data.front());
    data.remove_prefix(1);
    value |= uint64_t{byte & 0x7fu} << shift;
    if (byte < 0x80) return value;
  }
  throw Error(Code::kBundle, problem("graph", "a truncated file", "an ONNX graph", "copy or export the bundle again"));
}

std::vector<Field> fieldsOf(std::string_view data) {
  std::vector<Field> fields;
  while (!data.empty()) {
    const uint64_t key = varint(data), wire = key & 7;
    Field field{key >> 3, 0, {}};
    if (wire == 0) {
      field.value = varint(data);
    } else {
      const uint64_t size = wire == 2 ? varint(data) : wire == 1 ? 8 : 4;
      if (size > data.size()) throw Error(Code::kBundle, "graph: truncated");
      field.bytes = data.substr(0, size);
      data.remove_prefix(size);
    }
    fields.push_back(field);
  }
  return fields;
}

// Names of the values that the graph computes in float32: sinkexport.tensorrt.builder.float32_values.
std::set<std::string> float32Values(const std::string& graph) {
  constexpr uint64_t kGraph = 7, kNode = 1, kOutput = 12, kValueInfo = 13, kNodeOutput = 2, kName = 1, kType = 2;
  constexpr uint64_t kTensorType = 1, kElementType = 1, kFloat = 1;
  std::set<std::string> computed, found;
  std::vector<std::string_view> values;
  for (const Field& model : fieldsOf(graph)) {
    if (model.number != kGraph) continue;
    for (const Field& part : fieldsOf(model.bytes)) {
      if (part.number == kOutput || part.number == kValueInfo) values.push_back(part.bytes);
      if (part.number != kNode) continue;
      for (const Field& field : fieldsOf(part.bytes)) {
        if (field.number == kNodeOutput) computed.emplace(field.bytes);
      }
    }
  }
  for (const std::string_view value : values) {
    std::string name;
    bool is_float = false;
    for (const Field& field : fieldsOf(value)) {
      if (field.number == kName) name = field.bytes;
      if (field.number != kType) continue;
      for (const Field& type : fieldsOf(field.bytes)) {
        if (type.number != kTensorType) continue;
        for (const Field& tensor : fieldsOf(type.bytes)) {
          is_float = is_float || (tensor.number == kElementType && tensor.value == kFloat);
        }
      }
    }
    if (is_float && computed.count(name) != 0) found.insert(name);
  }
  return found;
}

}  // namespace

void holdPrecision(nvinfer1::INetworkDefinition& network, nvinfer1::IBuilderConfig& config, const std::string& graph) {
  using namespace nvinfer1;
  const std::set<std::string> float32 = float32Values(graph);
  config.setFlag(BuilderFlag::kFP16);
  config.setFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
  for (int32_t i = 0; i < network.getNbLayers(); ++i) {
    ILayer* layer = network.getLayer(i);
    if (layer->getNbOutputs() != 1 || float32.count(layer->getOutput(0)->getName()) == 0) continue;
    layer->setPrecision(DataType::kFLOAT);
    layer->setOutputType(0, DataType::kFLOAT);
  }
  const int32_t inputs = network.getNbInputs();
  for (int32_t i = 0; i < inputs + network.getNbOutputs(); ++i) {
    ITensor* tensor = i < inputs ? network.getInput(i) : network.getOutput(i - inputs);
    if (tensor->getType() != DataType::kINT8) continue;
    config.setFlag(BuilderFlag::kINT8);
    tensor->setDynamicRange(-127.0f, 127.0f);
  }
}

}  // namespace sinkrt

#endif
