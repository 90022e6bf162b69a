// IPluginV3 for TensorRT >= 10.3. States are aliased in place, which needs PreviewFeature::kALIASED_PLUGIN_IO_10_03 at
// build time; without it TensorRT gives outputs memory of their own and each run copies the states first.
#include <NvInferRuntime.h>

#if NV_TENSORRT_MAJOR >= 10
#if NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3
#error "TensorRT 10.3 or newer is needed: earlier ones cannot alias a plugin's input and output"
#endif

#include <atomic>
#include <deque>

#include "library.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

using namespace nvinfer1;

std::atomic<ILoggerFinder*> logger_finder{nullptr};

Tensors tensorsOf(const PluginTensorDesc* descs, int count) {
  Tensors tensors;
  for (int i = 0; i < count; ++i) tensors.push_back({descs[i].dims, descs[i].type});
  return tensors;
}

Tensors tensorsOf(const DynamicPluginTensorDesc* descs, int count) {
  Tensors tensors;
  for (int i = 0; i < count; ++i) tensors.push_back({descs[i].desc.dims, descs[i].desc.type});
  return tensors;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
 public:
  Plugin(const OperatorKind& kind, std::unique_ptr<Operator> op) : kind_(kind), op_(std::move(op)) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuildV2*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new Plugin(kind_, op_->clone()); }

  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return op_->numOutputs(); }
  int32_t getAliasedInput(int32_t index) noexcept override { return op_->aliasedInput(index); }

  int32_t getOutputDataTypes(DataType* types, int32_t num_outputs, const DataType* inputs,
                             int32_t num_inputs) const noexcept override {
    if (!hasCounts(num_inputs, num_outputs)) return 1;
    for (int i = 0; i < num_outputs; ++i) types[i] = op_->outputType(i, inputs);
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t num_inputs, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t num_outputs, IExprBuilder& builder) noexcept override {
    if (!hasCounts(num_inputs, num_outputs)) return 1;
    for (int i = 0; i < num_outputs; ++i) outputs[i] = outputShape(*op_, i, inputs, builder);
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* descs, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    return hasCounts(num_inputs, num_outputs) && descs[position].desc.format == TensorFormat::kLINEAR &&
           supportsType(*op_, position, tensorsOf(descs, position + 1));
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t num_inputs, const DynamicPluginTensorDesc*,
                          int32_t num_outputs) noexcept override {
    return hasCounts(num_inputs, num_outputs) && fits(tensorsOf(in, num_inputs)) ? 0 : 1;
  }

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t num_inputs, const PluginTensorDesc*,
                        int32_t num_outputs) noexcept override {
    return hasCounts(num_inputs, num_outputs) && fits(tensorsOf(in, num_inputs)) ? 0 : 1;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t num_inputs, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return op_->workspaceBytes(tensorsOf(in, num_inputs));
  }

  int32_t enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* in, void* const* out,
                  void* workspace, cudaStream_t stream) noexcept override {
    return runOperator(*op_, kind_.name, tensorsOf(descs, op_->numInputs()), in, out, workspace, stream);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_ = asPluginFields(op_->fields());
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  bool hasCounts(int32_t num_inputs, int32_t num_outputs) const {
    if (num_inputs == op_->numInputs() && num_outputs == op_->numOutputs()) return true;
    logError(kind_.name, "received " + std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) +
                             " outputs, expected " + std::to_string(op_->numInputs()) + " and " +
                             std::to_string(op_->numOutputs()) + " with these fields");
    return false;
  }

  bool fits(const Tensors& inputs) const {
    const std::string problem = op_->problem(inputs);
    if (!problem.empty()) logError(kind_.name, problem);
    return problem.empty();
  }

  const OperatorKind& kind_;
  std::unique_ptr<Operator> op_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const OperatorKind& kind) : kind_(kind), names_(kind.make()->fields()) {}

  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &names_.collection; }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
    std::unique_ptr<Operator> op = makeOperator(kind_, given);
    return op == nullptr ? nullptr : new Plugin(kind_, std::move(op));
  }

 private:
  const OperatorKind& kind_;
  FieldNames names_;
};

}  // namespace

ILogger* findLogger() {
  ILoggerFinder* finder = logger_finder.load();
  return finder == nullptr ? nullptr : finder->findLogger();
}

}  // namespace sinkexport::trt

// IPluginRegistry::loadLibrary calls these two; that is how the creators get into a registry.

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  sinkexport::trt::logger_finder.store(finder);
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static std::deque<sinkexport::trt::Creator> all;  // never moved: creators point into themselves
  static const auto creators = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> made;
    for (const auto& kind : sinkexport::trt::operatorKinds()) made.push_back(&all.emplace_back(kind));
    return made;
  }();
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

#endif  // NV_TENSORRT_MAJOR >= 10
