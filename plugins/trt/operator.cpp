#include "operator.h"

#include <cuda_runtime_api.h>

namespace sinkexport::trt {

namespace {

constexpr int kMostTensors = 32;  // of inputs, and of outputs

struct FarApart {
  void* addresses[2 * kMostTensors];
  FarApart() {
    for (int i = 0; i < 2 * kMostTensors; ++i)
      addresses[i] = reinterpret_cast<void*>(static_cast<uintptr_t>(i + 1) << 40);
  }
};

void* const* farApart() {
  static const FarApart all;
  return all.addresses;
}

}  // namespace

const void* const* anyInputs() {
  return farApart();
}

void* const* anyOutputs() {
  return farApart() + kMostTensors;
}

std::unique_ptr<Operator> makeOperator(const OperatorKind& kind, const nvinfer1::PluginFieldCollection* given) {
  std::unique_ptr<Operator> op = kind.make();
  std::string problem = readFields(op->fields(), given);
  if (problem.empty()) problem = op->fieldProblem();
  if (problem.empty()) return op;
  logError(kind.name, problem);
  return nullptr;
}

int32_t runOperator(const Operator& op, const char* name, const Tensors& inputs, const void* const* in,
                    void* const* out, void* workspace, cudaStream_t stream) {
  const auto bytesOf = [](const Tensor& tensor) {
    size_t size = tensor.type == nvinfer1::DataType::kINT8 ? 1 : isHalf(tensor.type) ? 2 : 4;
    for (int32_t i = 0; i < tensor.dims.nbDims; ++i) size *= static_cast<size_t>(tensor.dims.d[i]);
    return size;
  };
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < op.numOutputs() && error == cudaSuccess; ++i) {
    const int source = op.aliasedInput(i);
    if (source < 0 || in[source] == out[i]) continue;
    error = cudaMemcpyAsync(out[i], in[source], bytesOf(inputs[source]), cudaMemcpyDeviceToDevice, stream);
  }
  if (error == cudaSuccess) error = op.enqueue(inputs, in, out, workspace, stream);
  if (error == cudaSuccess) return 0;
  const std::string problem = op.problem(inputs);
  logError(name, problem.empty() ? cudaGetErrorString(error) : problem);
  return 1;
}

bool supportsType(const Operator& op, int position, const Tensors& tensors) {
  const nvinfer1::DataType type = tensors[position].type;
  if (position < op.numInputs()) return op.takesType(position, type, tensors);
  std::vector<nvinfer1::DataType> inputs;
  for (int i = 0; i < op.numInputs(); ++i) inputs.push_back(tensors[i].type);
  return type == op.outputType(position - op.numInputs(), inputs.data());
}

nvinfer1::DimsExprs outputShape(const Operator& op, int index, const nvinfer1::DimsExprs* inputs,
                                nvinfer1::IExprBuilder& builder) {
  nvinfer1::DimsExprs dims = inputs[op.likeInput(index)];
  if (op.lastAxis(index) > 0) dims.d[dims.nbDims - 1] = builder.constant(op.lastAxis(index));
  if (op.appendedAxis(index) > 0) dims.d[dims.nbDims++] = builder.constant(op.appendedAxis(index));
  return dims;
}

int numRows(const nvinfer1::Dims& dims) {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) rows *= dims.d[i];
  return rows > INT32_MAX ? 0 : static_cast<int>(rows);  // kernels refuse 0
}

std::string flagProblem(const char* name, int32_t value) {
  if (value == 0 || value == 1) return "";
  return std::string("field '") + name + "': received " + std::to_string(value) + ", expected 0 or 1";
}

std::string leastProblem(const char* name, int32_t value, int32_t least) {
  if (value >= least) return "";
  return std::string("field '") + name + "': received " + std::to_string(value) +
         ", expected >= " + std::to_string(least);
}

bool hasShape(const Tensor& tensor, const std::vector<int64_t>& wanted) {
  if (tensor.dims.nbDims != static_cast<int32_t>(wanted.size())) return false;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (tensor.dims.d[i] != wanted[i]) return false;
  }
  return true;
}

std::string shapeProblem(const char* name, const Tensor& tensor, const std::vector<int64_t>& wanted) {
  if (hasShape(tensor, wanted)) return "";
  std::string text = std::string(name) + ": received [";
  for (int32_t i = 0; i < tensor.dims.nbDims; ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.dims.d[i]);
  text += "], expected [";
  for (size_t i = 0; i < wanted.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(wanted[i]);
  return text + "]";
}

}  // namespace sinkexport::trt
