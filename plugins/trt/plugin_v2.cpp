// IPluginV2DynamicExt for TensorRT 8.5 and 8.6 (JetPack 5). They know no aliased plugin I/O: bind a state's input and
// output to one buffer and the plugin sees equal pointers and writes in place; otherwise each run copies the state
// first.
#include <NvInferRuntime.h>

#if NV_TENSORRT_MAJOR < 10
#if NV_TENSORRT_MAJOR != 8 || NV_TENSORRT_MINOR < 5
#error "TensorRT 8.5, 8.6 or 10.3 and newer is needed"
#endif

#include <cstring>
#include <deque>

#include "library.h"
#include "operator.h"

// Weak: this library is loaded by programs that have TensorRT, and is not linked with it.
extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept __attribute__((weak));
extern "C" nvinfer1::ILogger* getLogger() noexcept __attribute__((weak));

namespace sinkexport::trt {
namespace {

using namespace nvinfer1;

Tensors tensorsOf(const PluginTensorDesc* descs, int count) {
  Tensors tensors;
  for (int i = 0; i < count; ++i) tensors.push_back({descs[i].dims, descs[i].type});
  return tensors;
}

class Plugin final : public IPluginV2DynamicExt {
 public:
  Plugin(const OperatorKind& kind, std::unique_ptr<Operator> op) : kind_(kind), op_(std::move(op)) {}

  IPluginV2DynamicExt* clone() const noexcept override { return new Plugin(kind_, op_->clone()); }
  const char* getPluginType() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  void setPluginNamespace(const char*) noexcept override {}
  int32_t getNbOutputs() const noexcept override { return op_->numOutputs(); }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  size_t getSerializationSize() const noexcept override { return serializedBytes(op_->fields()); }
  void serialize(void* buffer) const noexcept override { trt::serialize(op_->fields(), buffer); }

  DataType getOutputDataType(int32_t index, const DataType* inputs, int32_t) const noexcept override {
    return op_->outputType(index, inputs);
  }

  DimsExprs getOutputDimensions(int32_t index, const DimsExprs* inputs, int32_t num_inputs,
                                IExprBuilder& builder) noexcept override {
    if (num_inputs != op_->numInputs()) {
      logError(kind_.name, "received " + std::to_string(num_inputs) + " inputs, expected " +
                               std::to_string(op_->numInputs()) + " with these fields");
      return {};
    }
    return outputShape(*op_, index, inputs, builder);
  }

  bool supportsFormatCombination(int32_t position, const PluginTensorDesc* descs, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    if (num_inputs != op_->numInputs() || num_outputs != op_->numOutputs()) return false;
    return descs[position].format == TensorFormat::kLINEAR &&
           supportsType(*op_, position, tensorsOf(descs, position + 1));
  }

  // It cannot fail; what does not fit is reported here and again, as an error, when it should run.
  void configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_inputs, const DynamicPluginTensorDesc*,
                       int32_t) noexcept override {
    Tensors inputs;
    for (int i = 0; i < num_inputs; ++i) inputs.push_back({in[i].desc.dims, in[i].desc.type});
    const std::string problem = op_->problem(inputs);
    if (!problem.empty()) logError(kind_.name, problem);
  }

  size_t getWorkspaceSize(const PluginTensorDesc* in, int32_t num_inputs, const PluginTensorDesc*,
                          int32_t) const noexcept override {
    return op_->workspaceBytes(tensorsOf(in, num_inputs));
  }

  int32_t enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* in, void* const* out,
                  void* workspace, cudaStream_t stream) noexcept override {
    return runOperator(*op_, kind_.name, tensorsOf(descs, op_->numInputs()), in, out, workspace, stream);
  }

 private:
  const OperatorKind& kind_;
  std::unique_ptr<Operator> op_;
};

class Creator final : public IPluginCreator {
 public:
  explicit Creator(const OperatorKind& kind) : kind_(kind), names_(kind.make()->fields()) {}

  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  void setPluginNamespace(const char*) noexcept override {}
  const PluginFieldCollection* getFieldNames() noexcept override { return &names_.collection; }

  IPluginV2DynamicExt* createPlugin(const char*, const PluginFieldCollection* given) noexcept override {
    std::unique_ptr<Operator> op = makeOperator(kind_, given);
    return op == nullptr ? nullptr : new Plugin(kind_, std::move(op));
  }

  IPluginV2DynamicExt* deserializePlugin(const char*, const void* data, size_t num_bytes) noexcept override {
    std::unique_ptr<Operator> op = kind_.make();
    std::string problem = deserialize(op->fields(), data, num_bytes);
    if (problem.empty()) problem = op->fieldProblem();
    if (problem.empty()) return new Plugin(kind_, std::move(op));
    logError(kind_.name, problem);
    return nullptr;
  }

 private:
  const OperatorKind& kind_;
  FieldNames names_;
};

// Registers the creators when the library is loaded.
struct Registration {
  std::deque<Creator> creators;  // never moved: they point into themselves

  Registration() {
    if (getPluginRegistry == nullptr) {
      logError("sinkexport", "TensorRT is not loaded, or not for all to see: load libnvinfer first, with RTLD_GLOBAL");
      return;
    }
    for (const OperatorKind& kind : operatorKinds()) {
      getPluginRegistry()->registerCreator(creators.emplace_back(kind), kPluginNamespace);
    }
  }
} registration;

}  // namespace

ILogger* findLogger() {
  return getLogger == nullptr ? nullptr : getLogger();
}

}  // namespace sinkexport::trt

#endif  // NV_TENSORRT_MAJOR < 10
