#include "node.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <locale>
#include <sstream>

namespace sinkexport::ort {
namespace {

constexpr const char* kFields = "fields";  // the attribute of this name

Tensor described(const Api& api, OrtTypeInfo* info) {
  const OrtTensorInfo* tensor = nullptr;
  Tensor out{kUndefined, {}};
  if (api.succeeds<CastTypeInfoToTensorInfo>(static_cast<const OrtTypeInfo*>(info), &tensor) && tensor != nullptr) {
    size_t rank = 0;
    api.call<GetTensorElementType>(tensor, &out.type);
    api.call<GetDimensionsCount>(tensor, &rank);
    out.shape.resize(rank);
    if (rank > 0) api.call<GetDimensions>(tensor, out.shape.data(), rank);
  }
  api.plain<ReleaseTypeInfo>(info);
  return out;
}

const char* typeName(int type) {
  switch (type) {
    case kFloat:
      return "float32";
    case kUint8:
      return "uint8";
    case kInt8:
      return "int8";
    case kInt64:
      return "int64";
    case kFloat16:
      return "float16";
    default:
      return "another type";
  }
}

std::string text(const Tensor& tensor) {
  return std::string(typeName(tensor.type)) + " " + shown(tensor.shape);
}

}  // namespace

int64_t Tensor::elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

std::string shown(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

Node::Node(const Api& api, const OrtKernelInfo* info, const char* operator_name) : api_(api), info_(info) {
  char name[128] = "";
  size_t bytes = sizeof name;
  name_ = operator_name;
  if (api.succeeds<KernelInfoGetNodeName>(info, name, &bytes)) name_ += std::string(" '") + name + "'";
  readFields();
  size_t count = 0;
  api.call<KernelInfoGetInputCount>(info, &count);
  for (size_t i = 0; i < count; ++i) {
    OrtTypeInfo* type = nullptr;
    api.call<KernelInfoGetInputTypeInfo>(info, i, &type);
    inputs_.push_back(described(api, type));
  }
  api.call<KernelInfoGetOutputCount>(info, &count);
  for (size_t i = 0; i < count; ++i) {
    OrtTypeInfo* type = nullptr;
    api.call<KernelInfoGetOutputTypeInfo>(info, i, &type);
    outputs_.push_back(described(api, type));
  }
  for (const auto* tensors : {&inputs_, &outputs_}) {
    for (const Tensor& tensor : *tensors) {
      for (const int64_t size : tensor.shape) {
        if (size < 0) refuse("shapes", "one that is only known at run time", "static shapes");
      }
    }
  }
}

// One attribute has all of them, `name=value` with commas between: ONNX Runtime keeps each attribute of a node twice,
// and lists attributes to nobody, so that a field of a later version would be left out without a word.
void Node::readFields() {
  size_t bytes = 0;
  api_.succeeds<KernelInfoGetAttributeString>(info_, kFields, nullptr, &bytes);
  std::string value(bytes, '\0');
  if (bytes == 0 || !api_.succeeds<KernelInfoGetAttributeString>(info_, kFields, value.data(), &bytes)) {
    refuse(kFields, "nothing", "the node's fields");
  }
  if (std::strlen(value.c_str()) + 1 != bytes) refuse(kFields, "a text with a zero byte in it", "one without");
  value.resize(bytes - 1);  // its end
  std::istringstream all(value);
  for (std::string one; std::getline(all, one, ',');) {
    const size_t end = std::min(one.find('='), one.size());
    const std::string name = one.substr(0, end), text = one.substr(std::min(end + 1, one.size()));
    if (!fields_.emplace(name, text).second) refuse(kFields, "'" + name + "' twice", "each field once");
  }
}

const std::string& Node::field(const char* name, const std::string& expected) {
  const auto found = fields_.find(name);
  if (found == fields_.end()) refuse(name, "nothing", expected);
  asked_.insert(name);
  return found->second;
}

template <typename Number>
Number Node::parsed(const char* name, const std::string& expected) {
  const std::string& text = field(name, expected);
  std::istringstream from(text);
  from.imbue(std::locale::classic());  // whatever the host speaks
  Number value{};
  if (!(from >> std::noskipws >> value) || !from.eof()) refuse(name, "'" + text + "'", expected);
  return value;
}

int64_t Node::integer(const char* field, int64_t least, int64_t most) {
  const auto value = parsed<int64_t>(field, "an integer");
  if (value < least || value > most) {
    refuse(field, std::to_string(value), std::to_string(least) + " .. " + std::to_string(most));
  }
  return value;
}

int Node::size(const char* field, int least) {
  return static_cast<int>(integer(field, least, INT_MAX));
}

float Node::number(const char* field) {
  const auto value = static_cast<float>(parsed<double>(field, "a finite number"));
  if (!std::isfinite(value)) refuse(field, "no finite number", "a number");
  return value;
}

int Node::choice(const char* name, std::initializer_list<const char*> choices) {
  std::string expected;
  for (const char* one : choices) expected += (expected.empty() ? "" : " | ") + std::string(one);
  const std::string& value = field(name, expected);
  const auto found = std::find(choices.begin(), choices.end(), value);
  if (found == choices.end()) refuse(name, "'" + value + "'", expected);
  return static_cast<int>(found - choices.begin());
}

size_t Node::take(const char* name) {
  if (taken_ == inputs_.size()) refuse(name, "nothing", "an input");
  return taken_++;
}

size_t Node::take(const char* name, int type, const std::vector<int64_t>& shape) {
  const size_t index = take(name);
  const Tensor wanted{type, shape};
  if (inputs_[index].type != type || inputs_[index].shape != shape) {
    refuse(name, text(inputs_[index]), text(wanted));
  }
  return index;
}

void Node::refuseOtherFields() const {
  for (const auto& [name, value] : fields_) {
    if (asked_.count(name) == 0) refuse(kFields, "'" + name + "'", "fields that this version of the library knows");
  }
}

void Node::finish(const std::vector<Tensor>& outputs) const {
  refuseOtherFields();
  if (taken_ != inputs_.size()) refuse("inputs", std::to_string(inputs_.size()), std::to_string(taken_));
  if (outputs_.size() != outputs.size()) {
    refuse("outputs", std::to_string(outputs_.size()), std::to_string(outputs.size()));
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs_[i].type != outputs[i].type || outputs_[i].shape != outputs[i].shape) {
      refuse("output " + std::to_string(i), text(outputs_[i]), text(outputs[i]));
    }
  }
}

const void* Node::constant(size_t index) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (!api_.succeeds<KernelInfoGetConstantInput>(info_, index, &is_constant, &value)) return nullptr;
  if (is_constant == 0 || value == nullptr) return nullptr;
  void* data = nullptr;
  api_.call<GetTensorMutableData>(const_cast<OrtValue*>(value), &data);
  return data;
}

void Node::refuse(const std::string& what, const std::string& received, const std::string& expected) const {
  throw std::runtime_error(name_ + ": " + what + ": received " + received + ", expected " + expected);
}

void Node::refuseIf(const char* problem) const {
  if (problem != nullptr) throw std::runtime_error(name_ + ": " + problem);
}

}  // namespace sinkexport::ort
