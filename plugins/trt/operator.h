// What a node computes, whatever plugin interface a version of TensorRT has: plugin_v2.cpp and plugin_v3.cpp wrap it.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "fields.h"
#include "types.h"

namespace sinkexport::trt {

struct Tensor {
  nvinfer1::Dims dims;
  nvinfer1::DataType type;
};

using Tensors = std::vector<Tensor>;

// One node. All tensors are dense and row-major (TensorRT's kLINEAR); shapes are static.
class Operator {
 public:
  virtual ~Operator() = default;
  virtual std::unique_ptr<Operator> clone() const = 0;

  virtual FieldList fields() = 0;
  // "", or one line about a field whose value makes no sense.
  virtual std::string fieldProblem() const = 0;

  virtual int numInputs() const = 0;
  virtual int numOutputs() const = 0;
  // The input that output `index` has the shape of, and the type, unless one of the next three says otherwise.
  virtual int likeInput(int index) const = 0;
  virtual nvinfer1::DataType outputType(int index, const nvinfer1::DataType* inputs) const {
    return inputs[likeInput(index)];
  }
  // Length of the last axis of output `index`; 0: as in its input.
  virtual int lastAxis(int /*index*/) const { return 0; }
  // Length of an axis that output `index` has after those of its input; 0: none.
  virtual int appendedAxis(int /*index*/) const { return 0; }
  // The input that output `index` is the later state of; -1: none. They may and should share memory.
  virtual int aliasedInput(int /*index*/) const { return -1; }

  // Whether input `index` may have this type, given those before it.
  virtual bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const = 0;
  // "", or one line about inputs that do not fit together.
  virtual std::string problem(const Tensors& inputs) const = 0;
  virtual size_t workspaceBytes(const Tensors& inputs) const = 0;
  // Asynchronous on `stream`. Outputs that alias an input have its contents already.
  virtual cudaError_t enqueue(const Tensors& inputs, const void* const* in, void* const* out, void* workspace,
                              cudaStream_t stream) const = 0;
};

// Addresses that lie far apart, for as many inputs and outputs as a node can have: where only checks and sizes are
// wanted, and nobody reads or writes there.
const void* const* anyInputs();
void* const* anyOutputs();

// An operator that is one launch. Its parameters are made in one place, for the launch and for the checks before it.
// kProblem, kLaunch: of the kernel's header.
template <typename Params, auto kProblem, auto kLaunch>
class KernelOperator : public Operator {
 public:
  std::string problem(const Tensors& inputs) const final {
    const std::string found = misfit(inputs);
    if (!found.empty()) return found;
    const char* refused = kProblem(params(inputs));
    return refused != nullptr ? refused : "";
  }

  size_t workspaceBytes(const Tensors&) const override { return 0; }

  cudaError_t enqueue(const Tensors& inputs, const void* const* in, void* const* out, [[maybe_unused]] void* workspace,
                      cudaStream_t stream) const final {
    if constexpr (std::is_invocable_v<decltype(kLaunch), const Params&, void*, cudaStream_t>) {
      return kLaunch(params(inputs, in, out), workspace, stream);
    } else {
      return kLaunch(params(inputs, in, out), stream);
    }
  }

 protected:
  // "", or one line about inputs whose shapes do not fit the fields or each other.
  virtual std::string misfit(const Tensors& inputs) const = 0;
  virtual Params params(const Tensors& inputs, const void* const* in, void* const* out) const = 0;
  Params params(const Tensors& inputs) const { return params(inputs, anyInputs(), anyOutputs()); }
};

struct OperatorKind {
  const char* name;
  std::unique_ptr<Operator> (*make)();
};

constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";

std::unique_ptr<Operator> makeSinkAttention();
std::unique_ptr<Operator> makeInt8Linear();
std::unique_ptr<Operator> makeInt4Linear();
std::unique_ptr<Operator> makeHalfLinear();
std::unique_ptr<Operator> makeInt8ExpertLinear();
std::unique_ptr<Operator> makeInt4ExpertLinear();
std::unique_ptr<Operator> makeHalfExpertLinear();
std::unique_ptr<Operator> makeInt8Rows();
std::unique_ptr<Operator> makeInt4Rows();
std::unique_ptr<Operator> makeRmsNorm();
std::unique_ptr<Operator> makeGatedActivation();

inline const std::vector<OperatorKind>& operatorKinds() {
  static const std::vector<OperatorKind> kinds = {
      {"SinkAttention", makeSinkAttention},
      {"Int8Linear", makeInt8Linear},
      {"Int4Linear", makeInt4Linear},
      {"HalfLinear", makeHalfLinear},
      {"Int8ExpertLinear", makeInt8ExpertLinear},
      {"Int4ExpertLinear", makeInt4ExpertLinear},
      {"HalfExpertLinear", makeHalfExpertLinear},
      {"Int8Rows", makeInt8Rows},
      {"Int4Rows", makeInt4Rows},
      {"RmsNorm", makeRmsNorm},
      {"GatedActivation", makeGatedActivation},
  };
  return kinds;
}

// Makes an operator and sets its fields. Null after a line in the log that names the field.
std::unique_ptr<Operator> makeOperator(const OperatorKind& kind, const nvinfer1::PluginFieldCollection* given);

// Brings each state that TensorRT did not alias to where it is to be written, then runs the operator. 0 or, after a
// line in the log, not.
int32_t runOperator(const Operator& op, const char* name, const Tensors& inputs, const void* const* in,
                    void* const* out, void* workspace, cudaStream_t stream);

// Whether the tensor `position` in inputs-then-outputs order may have its type, given those before it.
bool supportsType(const Operator& op, int position, const Tensors& tensors);

nvinfer1::DimsExprs outputShape(const Operator& op, int index, const nvinfer1::DimsExprs* inputs,
                                nvinfer1::IExprBuilder& builder);

// --- small things that operators share ---

inline bool isHalf(nvinfer1::DataType type) {
#if NV_TENSORRT_MAJOR >= 10
  if (type == nvinfer1::DataType::kBF16) return true;
#endif
  return type == nvinfer1::DataType::kHALF;
}

inline DType halfType(nvinfer1::DataType type) {
  return type == nvinfer1::DataType::kHALF ? DType::kFloat16 : DType::kBFloat16;
}

// Rows of a tensor [.., K] with at least one axis.
int numRows(const nvinfer1::Dims& dims);

// "", or one line about a field that says yes or no, or is too small.
std::string flagProblem(const char* name, int32_t value);
std::string leastProblem(const char* name, int32_t value, int32_t least);

bool hasShape(const Tensor& tensor, const std::vector<int64_t>& wanted);
// "q: received [1, 2], expected [1, 3]"
std::string shapeProblem(const char* name, const Tensor& tensor, const std::vector<int64_t>& wanted);

void logError(const char* name, const std::string& line);

}  // namespace sinkexport::trt
