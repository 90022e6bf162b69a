// ONNX Runtime on the CPU, with every input and output bound to a buffer that is allocated once. Twin of
// runtime/sinkrt/backends/ort.py.
#include <algorithm>
#include <cstring>
#include <optional>

#include "backends/cpu_library.h"
#include "backends/memory.h"
#include "backends/ort_api.h"
#include "backends/weights.h"
#include "files.h"
#include "sinkrt/backend.h"
#include "sinkrt/constants.h"

namespace sinkrt {
namespace {

constexpr int kFatal = 4;  // nothing on stderr
constexpr int kSequential = 0;

// Where a tensor lies.
struct Place {
  TensorSpec spec;
  char* data;
};

// A graph with its buffers, ready to run any number of times.
struct Binding {
  std::vector<OrtOwned<OrtValue, ort::ReleaseValue>> values;
  OrtOwned<OrtIoBinding, ort::ReleaseIoBinding> binding;
};

// One graph of the bundle, loaded.
class Graph {
 public:
  Graph(const OrtApi& api, OrtEnv* env, const std::string& bundle, const Manifest& manifest, const std::string& role,
        int threads, bool repack, const std::string& library, SharedWeights* weights)
      : api_(api), role_(role) {
    const GraphSpec& graph = manifest.graphs.at(role);
    try {
      OrtRunOptions* run = nullptr;
      api.call<ort::CreateRunOptions>(&run);
      run_ = {api, run};
      OrtSessionOptions* made = nullptr;
      api.call<ort::CreateSessionOptions>(&made);
      const OrtOwned<OrtSessionOptions, ort::ReleaseSessionOptions> options(api, made);
      api.call<ort::SetSessionLogSeverityLevel>(made, kFatal);
      // One graph, one stream of nodes: the threads serve single operators.
      api.call<ort::SetSessionExecutionMode>(made, kSequential);
      // Threads spin while a step runs and sleep between steps: the host has other work to do on its cores.
      api.call<ort::AddSessionConfigEntry>(made, "session.force_spinning_stop", "1");
      // Q/DQ nodes are computed as they stand: see sinkrt/backends/ort.py.
      api.call<ort::AddSessionConfigEntry>(made, "session.disable_quant_qdq", "1");
      // In its first run the prefill graph takes memory tensor by tensor, and that is kept: a plan would take as much
      // again.
      if (role == "prefill") api.call<ort::DisableMemPattern>(made);
      if (!repack) api.call<ort::AddSessionConfigEntry>(made, "session.disable_prepacking", "1");
      if (threads > 0) {
        api.call<ort::SetIntraOpNumThreads>(made, threads);
        api.call<ort::AddSessionConfigEntry>(made, kThreadsOption, std::to_string(threads).c_str());
      }
      if (!library.empty()) {
        // The library's own threads spin; ONNX Runtime's, which have little to do, must not do so on the same cores.
        api.call<ort::AddSessionConfigEntry>(made, "session.intra_op.allow_spinning", "0");
        registerOperators(library, made);
      }
      if (weights != nullptr) weights->give(graph.file, made);
      OrtSession* session = nullptr;
      api.call<ort::CreateSession>(env, joined(bundle, graph.file).c_str(), made, &session);
      session_ = {api, session};
      std::vector<TensorSpec> inputs = graph.inputs, outputs = graph.outputs;
      for (const StateSpec& state : manifest.states) {
        TensorSpec spec = state.tensor();
        spec.shape[0] = graph.inputs[0].shape[0];
        inputs.push_back(spec);
        spec.name = state.output;
        outputs.push_back(spec);
      }
      compare<ort::SessionGetInputCount, ort::SessionGetInputName, ort::SessionGetInputTypeInfo>("input", inputs);
      compare<ort::SessionGetOutputCount, ort::SessionGetOutputName, ort::SessionGetOutputTypeInfo>("output", outputs);
      compareLayout(graph.file, manifest);
    } catch (const OrtFailure& failure) {
      if (failure.out_of_memory) {
        throw Error(Code::kOutOfMemory, problem(graph.file, "too little memory (" + failure.message + ")",
                                                "room for the weights", "use a smaller model or quantised weights"));
      }
      throw Error(Code::kBundle, problem(graph.file, "a graph that ONNX Runtime refuses (" + failure.message + ")",
                                         "a graph that 'sinkexport export' wrote", "export the model again"));
    }
  }

  // Tie the graph to buffers. states: their inputs' places, in the manifest's order.
  Binding bind(const std::vector<Place>& inputs, const std::vector<Place>& outputs, const std::vector<Place>& states,
               const std::vector<StateSpec>& specs) const {
    Binding out;
    try {
      OrtMemoryInfo* made = nullptr;
      api_.call<ort::CreateCpuMemoryInfo>(ort::kDeviceAllocator, ort::kDefaultMemory, &made);
      const OrtOwned<OrtMemoryInfo, ort::ReleaseMemoryInfo> memory(api_, made);
      OrtIoBinding* binding = nullptr;
      api_.call<ort::CreateIoBinding>(session_.get(), &binding);
      out.binding = {api_, binding};
      const auto value = [&](const Place& place) {
        OrtValue* tensor = nullptr;
        const TensorSpec& spec = place.spec;
        api_.call<ort::CreateTensorWithDataAsOrtValue>(made, place.data, static_cast<size_t>(spec.bytes()),
                                                       spec.shape.data(), spec.shape.size(), ortType(spec.dtype),
                                                       &tensor);
        out.values.emplace_back(api_, tensor);
        return tensor;
      };
      for (const Place& place : inputs) api_.call<ort::BindInput>(binding, place.spec.name.c_str(), value(place));
      for (const Place& place : outputs) api_.call<ort::BindOutput>(binding, place.spec.name.c_str(), value(place));
      for (size_t i = 0; i < states.size(); ++i) {
        OrtValue* tensor = value(states[i]);
        api_.call<ort::BindInput>(binding, specs[i].input.c_str(), tensor);
        api_.call<ort::BindOutput>(binding, specs[i].output.c_str(), tensor);
      }
    } catch (const OrtFailure& failure) {
      throw Error(Code::kBackend,
                  problem(role_ + " graph", failure.message, "buffers that bind", "export the model again"));
    }
    return out;
  }

  void run(const Binding& binding) const {
    try {
      api_.call<ort::RunWithBinding>(session_.get(), run_.get(), binding.binding.get());
    } catch (const OrtFailure& failure) {
      throw Error(failure.out_of_memory ? Code::kOutOfMemory : Code::kBackend,
                  problem(role_ + " run", failure.message, "a run without error", "reset or reload the session"));
    }
  }

 private:
  // What fails here is no fault of the bundle.
  void registerOperators(const std::string& library, OrtSessionOptions* options) const {
    void* handle = nullptr;  // of the library, which stays loaded
    try {
      api_.call<ort::RegisterCustomOpsLibrary>(options, library.c_str(), &handle);
    } catch (const OrtFailure& failure) {
      throw Error(Code::kBackend, problem("CPU library", "'" + library + "' (" + failure.message + ")",
                                          "one that ONNX Runtime can use, and threads that start",
                                          "ask for fewer threads, or build the library of this version"));
    }
  }

  // The graph must have exactly the tensors that the manifest names.
  template <typename Count, typename Name, typename Type>
  void compare(const std::string& kind, const std::vector<TensorSpec>& wanted) const {
    OrtAllocator* allocator = nullptr;
    api_.call<ort::GetAllocatorWithDefaultOptions>(&allocator);
    size_t count = 0;
    api_.call<Count>(session_.get(), &count);
    std::map<std::string, std::string> found, expected;
    std::vector<std::string> names;  // as they come: the first that differs is named
    for (const TensorSpec& spec : wanted) {
      expected[spec.name] = shown(spec.dtype, spec.shape);
      names.push_back(spec.name);
    }
    for (size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      api_.call<Name>(session_.get(), i, allocator, &name);
      const std::string kept = name;
      api_.call<ort::AllocatorFree>(allocator, static_cast<void*>(name));
      OrtTypeInfo* made = nullptr;
      api_.call<Type>(session_.get(), i, &made);
      const OrtOwned<OrtTypeInfo, ort::ReleaseTypeInfo> info(api_, made);
      const OrtTensorInfo* tensor = nullptr;
      api_.call<ort::CastTypeInfoToTensorInfo>(made, &tensor);
      int type = 0;
      size_t rank = 0;
      if (tensor != nullptr) {
        api_.call<ort::GetTensorElementType>(tensor, &type);
        api_.call<ort::GetDimensionsCount>(tensor, &rank);
      }
      std::vector<int64_t> shape(rank);
      if (rank > 0) api_.call<ort::GetDimensions>(tensor, shape.data(), rank);
      found[kept] = shown(ortTypeName(type), shape);
      names.push_back(kept);
    }
    for (const std::string& name : names) {
      const auto actual = found.find(name), should = expected.find(name);
      const std::string received = actual == found.end() ? "nothing" : actual->second;
      const std::string needed = should == expected.end() ? "nothing" : should->second;
      if (received == needed) continue;
      throw Error(Code::kBundle, problem("graph " + kind + " '" + name + "'", received, needed,
                                         "graph and manifest differ: export again"));
    }
  }

  // The graph must have been made for the sizes that the manifest says: not all of them show in its inputs.
  void compareLayout(const std::string& file, const Manifest& manifest) const {
    OrtAllocator* allocator = nullptr;
    api_.call<ort::GetAllocatorWithDefaultOptions>(&allocator);
    OrtModelMetadata* made = nullptr;
    api_.call<ort::SessionGetModelMetadata>(session_.get(), &made);
    const OrtOwned<OrtModelMetadata, ort::ReleaseModelMetadata> metadata(api_, made);
    char* value = nullptr;  // stays so where there is no such entry
    api_.call<ort::ModelMetadataLookupCustomMetadataMap>(made, allocator, kLayoutMetadata, &value);
    const std::string wanted = manifest.graphLayout();
    std::string found = "nothing";
    if (value != nullptr) {
      found = value;
      api_.call<ort::AllocatorFree>(allocator, static_cast<void*>(value));
    }
    if (found == wanted) return;
    throw Error(Code::kBundle, problem("layout in " + file, found, wanted, "graph and manifest differ: export again"));
  }

  static std::string shown(const std::string& type, const std::vector<int64_t>& shape) {
    std::string out = type + " [";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
  }

  const OrtApi& api_;
  std::string role_;
  OrtOwned<OrtRunOptions, ort::ReleaseRunOptions> run_;
  OrtOwned<OrtSession, ort::ReleaseSession> session_;
};

class OrtBackend final : public Backend {
 public:
  OrtBackend(const std::string& bundle, const Manifest& manifest, const BackendOptions& options) : Backend(manifest) {
    const OrtApi& api = OrtApi::load(options.onnxruntime_library);
    OrtEnv* env = api.environment();
    const std::string library = manifest.target == kCpuTarget ? checkedCpuLibrary(manifest, options) : "";
    const int64_t batch = manifest.stream.batch;
    const bool repack_prefill =
        options.repack_prefill < 0 ? manifest.weightsBytes() <= availableBytes() / 4 : options.repack_prefill != 0;
    // Refused before memory is touched: systems that hand out more than they have kill the process instead.
    if (const int64_t available = availableBytes(); available > 0 && manifest.stateBytes() > available) {
      refuseMemory(std::to_string(available) + " bytes", manifest.stateBytes());
    }
    // Opened first: a manifest whose sizes are not the graphs' is refused before memory is asked for.
    // Only weights that the library's operators read can be shared.
    if (!library.empty()) weights_ = std::make_unique<SharedWeights>(api, bundle, manifest_);
    const auto opened = [&](const std::string& role, bool repack) {
      return std::make_unique<Graph>(api, env, bundle, manifest, role, options.threads, repack, library,
                                     weights_.get());
    };
    decode_ = opened("decode", true);
    const auto found = manifest.graphs.find("prefill");
    if (found != manifest.graphs.end()) prefill_ = opened("prefill", repack_prefill);
    std::vector<int64_t> state_bytes;
    for (const StateSpec& state : manifest.states) state_bytes.push_back(state.bytes());
    states_.emplace(state_bytes);
    const GraphSpec& graph = manifest.graphs.at("decode");
    ids_ = &add(inputs_, graph.inputs, "ids");
    position_ = &add(inputs_, graph.inputs, "position");
    logits_.emplace_back(graph.outputs[0].bytes());
    kept_logits_.resize(logits_[0].size() / sizeof(float));
    step_ = decode_->bind({{spec(graph, "ids"), ids_->data()}, {spec(graph, "position"), position_->data()}},
                          {{graph.outputs[0], logits_[0].data()}}, statePlaces(0, batch), manifest.states);
    if (prefill_) {
      const GraphSpec& chunk = found->second;
      chunk_ids_ = &add(inputs_, chunk.inputs, "ids");
      chunk_position_ = &add(inputs_, chunk.inputs, "position");
      num_valid_ = &add(inputs_, chunk.inputs, "num_valid");
      for (int64_t b = 0; b < batch; ++b) {  // the prefill graph sees one stream: a row of each
        chunks_.push_back(prefill_->bind({{spec(chunk, "ids"), chunk_ids_->data()},
                                          {spec(chunk, "position"), chunk_position_->data()},
                                          {spec(chunk, "num_valid"), num_valid_->data()}},
                                         {{chunk.outputs[0], logits_[0].data() + b * chunk.outputs[0].bytes()}},
                                         statePlaces(b, 1), manifest.states));
      }
    }
    // ONNX Runtime allocates intermediate results in the first run: have that behind us when the stream starts.
    decode_->run(step_);
    const int64_t zero = 0;
    for (int64_t b = 0; b < static_cast<int64_t>(chunks_.size()); ++b) prefill(b, &zero, 1, 0);
    logits_[0].clear();
    states_->clear();
  }

  const char* name() const override { return "ort"; }

  void step(const int64_t* ids, const int64_t* positions, const bool* active) override {
    const int64_t batch = manifest_.stream.batch, width = manifest_.model.vocab_size;
    for (int64_t b = 0; b < batch; ++b) ids_->as<int64_t>()[b] = idFor(ids[b], active[b]);
    std::copy(positions, positions + batch, position_->as<int64_t>());
    float* rows = logits_[0].as<float>();
    for (int64_t b = 0; b < batch; ++b) {
      if (!active[b]) std::copy_n(rows + b * width, width, kept_logits_.begin() + b * width);
    }
    decode_->run(step_);
    for (int64_t b = 0; b < batch; ++b) {
      if (!active[b]) std::copy_n(kept_logits_.begin() + b * width, width, rows + b * width);
    }
  }

  void prefill(int64_t stream, const int64_t* ids, int64_t count, int64_t position) override {
    auto* chunk = chunk_ids_->as<int64_t>();
    std::copy(ids, ids + count, chunk);
    // Any token: what is not valid is computed and dropped.
    std::fill(chunk + count, chunk + manifest_.stream.chunk_size, int64_t{0});
    *chunk_position_->as<int64_t>() = position;
    *num_valid_->as<int64_t>() = count;
    prefill_->run(chunks_[static_cast<size_t>(stream)]);
  }

  const float* logits() override { return logits_[0].as<float>(); }
  void writeLogits(const float* logits) override { std::memcpy(logits_[0].data(), logits, logits_[0].size()); }
  void readState(size_t state, void* target) const override {
    std::memcpy(target, states_->data(state), states_->size(state));
  }
  void writeState(size_t state, const void* source) override {
    std::memcpy(states_->data(state), source, states_->size(state));
  }
  void clearStream(int64_t stream) override {
    for (size_t i = 0; i < states_->count(); ++i) {
      const int64_t bytes = manifest_.states[i].rowBytes();
      std::memset(states_->data(i) + stream * bytes, 0, static_cast<size_t>(bytes));
    }
  }
  std::vector<const void*> stateBuffers() const override {
    std::vector<const void*> out;
    for (size_t i = 0; i < states_->count(); ++i) out.push_back(states_->data(i));
    return out;
  }

 private:
  static const TensorSpec& spec(const GraphSpec& graph, const std::string& name) {
    return *std::find_if(graph.inputs.begin(), graph.inputs.end(), [&](const auto& s) { return s.name == name; });
  }

  static Buffer& add(std::vector<std::unique_ptr<Buffer>>& buffers, const std::vector<TensorSpec>& specs,
                     const std::string& name) {
    for (const TensorSpec& one : specs) {
      if (one.name == name) buffers.push_back(std::make_unique<Buffer>(one.bytes()));
    }
    return *buffers.back();
  }

  // Rows `first` .. first + count - 1 of every state.
  std::vector<Place> statePlaces(int64_t first, int64_t count) const {
    std::vector<Place> out;
    for (size_t i = 0; i < states_->count(); ++i) {
      Place place{manifest_.states[i].tensor(), states_->data(i) + first * manifest_.states[i].rowBytes()};
      place.spec.shape[0] = count;
      out.push_back(std::move(place));
    }
    return out;
  }

  std::unique_ptr<SharedWeights> weights_;  // before the graphs, which read them
  std::optional<StateMemory> states_;
  std::vector<std::unique_ptr<Buffer>> inputs_;
  Buffer* ids_ = nullptr;             // int64 [B, 1]
  Buffer* position_ = nullptr;        // int64 [B]
  Buffer* chunk_ids_ = nullptr;       // int64 [1, T]
  Buffer* chunk_position_ = nullptr;  // int64 [1]
  Buffer* num_valid_ = nullptr;       // int64 [1]
  std::vector<Buffer> logits_;        // one: float32 [B, vocab]
  std::vector<float> kept_logits_;    // [B, vocab]: rows of idle streams while the others step
  std::unique_ptr<Graph> decode_, prefill_;
  Binding step_;
  std::vector<Binding> chunks_;  // by stream
};

}  // namespace

std::unique_ptr<Backend> loadOrtBackend(const std::string& bundle, const Manifest& manifest,
                                        const BackendOptions& options) {
  return std::make_unique<OrtBackend>(bundle, manifest, options);
}

}  // namespace sinkrt
