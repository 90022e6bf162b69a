// TensorRT engines with everything allocated at load. A step is one CUDA graph: upload of ids and positions, engine,
// commit of the logits; in `steps` a token is one graph too, sampling included, and the host waits only at the end.
#include <fcntl.h>
#include <NvInferRuntime.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/tensorrt/library.h"
#include "bundle/engines.h"
#include "cuda/device.h"
#include "cuda/sampling.h"
#include "sinkrt/backend.h"

namespace sinkrt {
namespace {

using cuda::aligned;
using cuda::check;

constexpr int64_t kHistory = 256;  // tokens that one call decodes before it looks at them
constexpr int64_t kMinEndIds = 16;

// A file's content, mapped and not copied: engines hold gigabytes.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size > 0) {
      size_ = static_cast<size_t>(status.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    if (file >= 0) close(file);
    if (data_ == MAP_FAILED) {
      throw Error(Code::kBackend, problem("engine", "'" + path + "', which cannot be read", "a readable file",
                                          "build the engines again"));
    }
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  size_t size_ = 0;
};

// TensorRT's device memory comes from here, so that it is counted, and so that a lack of it is known as such.
class Allocator final : public nvinfer1::IGpuAllocator {
 public:
  void* allocate(uint64_t size, uint64_t, nvinfer1::AllocatorFlags) noexcept override {
    if (size == 0) return nullptr;
    void* memory = cuda::tryAllocate(size);
    if (memory == nullptr) refused_bytes_ = size;
    return memory;
  }
  bool deallocate(void* memory) noexcept override {
    cuda::release(memory);
    return true;
  }
#if defined(SINKRT_TENSORRT_8)
  void free(void* memory) noexcept override { cuda::release(memory); }
#endif

  uint64_t takeRefused() { return std::exchange(refused_bytes_, 0); }

 private:
  uint64_t refused_bytes_ = 0;
};

// One graph's engine, ready to be bound and run.
class Engine {
 public:
  Engine(TensorrtLibrary& library, nvinfer1::IRuntime& runtime, Allocator& allocator, std::string role,
         const std::string& path)
      : library_(library), role_(std::move(role)) {
    library_.logger().takeErrors();
    const MappedFile plan(path);
    engine_.reset(runtime.deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr) throw refusal(allocator, "an engine that this TensorRT runs");
#if defined(SINKRT_TENSORRT_8)
    context_.reset(engine_->createExecutionContextWithoutDeviceMemory());
#else
    context_.reset(engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#endif
    if (context_ == nullptr) throw refusal(allocator, "an execution context");
  }

  size_t scratchBytes() const {
#if defined(SINKRT_TENSORRT_8)
    return engine_->getDeviceMemorySize();
#else
    return static_cast<size_t>(engine_->getDeviceMemorySizeV2());
#endif
  }

  void setScratch(const cuda::Memory& memory) {
#if defined(SINKRT_TENSORRT_8)
    context_->setDeviceMemory(memory.data());
#else
    context_->setDeviceMemoryV2(memory.data(), static_cast<int64_t>(memory.bytes()));
#endif
  }

  // The engine must have exactly these tensors.
  void compare(const std::vector<TensorSpec>& specs) const {
    for (const TensorSpec& spec : specs) {
      const nvinfer1::Dims dims = engine_->getTensorShape(spec.name.c_str());
      const std::vector<int64_t> shape(dims.d, dims.d + std::max(dims.nbDims, 0));
      if (shape != spec.shape || typeName(engine_->getTensorDataType(spec.name.c_str())) != spec.dtype) {
        throw mismatch("tensor '" + spec.name + "'", "none of that shape and type");
      }
    }
    if (engine_->getNbIOTensors() != static_cast<int32_t>(specs.size())) {
      throw mismatch("number of tensors", std::to_string(engine_->getNbIOTensors()));
    }
  }

  void bind(const std::string& name, void* address) {
    if (!context_->setTensorAddress(name.c_str(), address)) {
      throw mismatch("address of '" + name + "'", library_.logger().takeErrors());
    }
  }

  void run(cudaStream_t stream) {
    if (context_->enqueueV3(stream)) return;
    throw Error(Code::kBackend, problem(role_ + " run", library_.logger().takeErrors(), "a run without error",
                                        "load the session again"));
  }

 private:
  static std::string typeName(nvinfer1::DataType type) {
    switch (type) {
      case nvinfer1::DataType::kFLOAT:
        return "float32";
      case nvinfer1::DataType::kHALF:
        return "float16";
      case nvinfer1::DataType::kINT8:
        return "int8";
      case nvinfer1::DataType::kINT32:
        return "int32";
#if !defined(SINKRT_TENSORRT_8)
      case nvinfer1::DataType::kINT64:
        return "int64";
#endif
      default:
        return "another type";
    }
  }

  Error mismatch(const std::string& what, const std::string& received) const {
    return {Code::kBackend,
            problem(role_ + " engine: " + what, received, "what the manifest says", "build the engines again")};
  }

  Error refusal(Allocator& allocator, const char* expected) {
    if (const uint64_t bytes = allocator.takeRefused()) {
      return {Code::kOutOfMemory, problem("GPU memory", "too little for the " + role_ + " engine",
                                          std::to_string((bytes >> 20) + 1) + " MiB more in one piece",
                                          "free some, or export with a smaller window or an INT8 recipe")};
    }
    return {Code::kBackend, problem(role_ + " engine", library_.logger().takeErrors(), expected,
                                    "build the engines again, on this machine")};
  }

  TensorrtLibrary& library_;
  std::string role_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

// Lays arrays out in one block that exists on the host and on the device alike, so that one copy moves many.
class Layout {
 public:
  size_t add(size_t bytes) {
    const size_t at = size_;
    size_ += aligned(bytes);
    return at;
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

class Mirror {
 public:
  Mirror() = default;
  Mirror(size_t bytes, const char* purpose) : host_(bytes), device_(bytes, purpose) {}

  template <typename T = char>
  T* host(size_t at) const {
    return reinterpret_cast<T*>(host_.data() + at);
  }
  template <typename T = char>
  T* device(size_t at) const {
    return reinterpret_cast<T*>(device_.data() + at);
  }

  void upload(size_t begin, size_t end, cudaStream_t stream) const {
    check(cudaMemcpyAsync(device(begin), host(begin), end - begin, cudaMemcpyHostToDevice, stream), "upload");
  }
  void download(size_t begin, size_t end, cudaStream_t stream) const {
    check(cudaMemcpyAsync(host(begin), device(begin), end - begin, cudaMemcpyDeviceToHost, stream), "download");
  }

 private:
  cuda::Pinned host_;
  cuda::Memory device_;
};

// Positions and other numbers in the layout that the graphs take.
void writePosition(void* target, bool wide, int64_t index, int64_t position) {
  if (wide) {
    static_cast<int64_t*>(target)[index] = position;
  } else {
    static_cast<int32_t*>(target)[2 * index] = static_cast<int32_t>(position >> 16);
    static_cast<int32_t*>(target)[2 * index + 1] = static_cast<int32_t>(position & 0xffff);
  }
}

void writeNumber(void* target, bool wide, int64_t index, int64_t value) {
  if (wide) {
    static_cast<int64_t*>(target)[index] = value;
  } else {
    static_cast<int32_t*>(target)[index] = static_cast<int32_t>(value);
  }
}

class TensorrtBackend final : public Backend {
 public:
  TensorrtBackend(const std::string& bundle, const Manifest& manifest, const BackendOptions& options)
      : Backend(manifest), device_(options.device), library_(prepared()), wide_(!manifest.plugin_abi) {
    EngineHost host{TensorrtLibrary::flavour(), library_.version(), {}, cuda::computeCapability(device_)};
    if (manifest.plugin_abi) {
      host.plugin_abi = library_.loadPlugin(options.plugin_library, bundle + "/" + kPluginFile);
    }
    stream_ = std::make_unique<cuda::Stream>();
    runtime_.reset(library_.createRuntime());
    runtime_->setGpuAllocator(&allocator_);
    for (const auto& [role, graph] : manifest.graphs) {
      const std::string path = checkEngine(bundle, manifest, role, host, options.verify);
      engines_[role] = std::make_unique<Engine>(library_, *runtime_, allocator_, role, path);
      engines_[role]->compare(specsOf(role));
    }
    size_t scratch_bytes = 0;
    for (const auto& [role, engine] : engines_) scratch_bytes = std::max(scratch_bytes, engine->scratchBytes());
    scratch_ = cuda::Memory(scratch_bytes, "TensorRT's scratch");  // one for both: they never run at the same time
    for (const auto& [role, engine] : engines_) engine->setScratch(scratch_);

    allocateBuffers();
    bindDecode();
    if (chunks() != nullptr) bindPrefill();
    recordGraphs();
    for (const cuda::Memory& state : states_) zero(state.data(), state.bytes());
    zero(logits_.data(), logits_.bytes());
    stream_->synchronize();
  }

  ~TensorrtBackend() override { cudaSetDevice(device_); }

  const char* name() const override { return "tensorrt"; }

  void step(const int64_t* ids, const int64_t* positions, const bool* active) override {
    enter();
    for (int64_t b = 0; b < batch(); ++b) {
      writeNumber(control_.host(ids_at_), wide_, b, idFor(ids[b], active[b]));
      writePosition(control_.host(position_at_), wide_, b, positions[b]);
      control_.host<int32_t>(active_at_)[b] = active[b];
    }
    host_logits_are_current_ = false;
    if (step_graph_) {
      step_graph_.launch(*stream_);
    } else {
      runStep();
    }
    stream_->synchronize();
  }

  void prefill(int64_t stream, const int64_t* ids, int64_t count, int64_t position) override {
    enter();
    const int64_t num_tokens = manifest_.stream.chunk_size;
    for (int64_t i = 0; i < num_tokens; ++i) writeNumber(chunk_.host(chunk_ids_at_), wide_, i, i < count ? ids[i] : 0);
    writePosition(chunk_.host(chunk_position_at_), wide_, 0, position);
    writeNumber(chunk_.host(chunk_count_at_), wide_, 0, count);
    host_logits_are_current_ = false;
    if (const cuda::Graph& graph = chunk_graphs_[stream]) {
      graph.launch(*stream_);
    } else {
      bindPrefill(stream);
      runPrefill(stream);
    }
    stream_->synchronize();
  }

  void steps(const StepsRequest& request) override {
    enter();
    prepareSampling(request);
    host_logits_are_current_ = false;
    int64_t* num_ids = request.num_ids;
    std::fill(num_ids, num_ids + batch(), 0);
    bool numbers = true;
    for (int64_t done = 0; done < request.count && numbers && !allEnded(request);) {
      const int64_t round = std::min(request.count - done, kHistory);
      for (int64_t b = 0; b < batch(); ++b) {
        writePosition(control_.host(position_at_), wide_, b, request.positions[b]);
        control_.host<int32_t>(ended_at_)[b] = request.ended[b];
        control_.host<int32_t>(invalid_at_)[b] = 0;
        control_.host<int32_t>(num_ids_at_)[b] = 0;
      }
      try {
        control_.upload(0, history_at_, *stream_);
        for (int64_t i = 0; i < round; ++i) {
          if (token_graph_) {
            token_graph_.launch(*stream_);
          } else {
            runToken();
          }
        }
        control_.download(ended_at_, control_bytes_, *stream_);
        stream_->synchronize();
      } catch (...) {  // how many of the round's tokens are in the states is on the GPU alone
        for (int64_t b = 0; b < batch(); ++b) {
          if (!request.ended[b]) request.damaged[b] = 1;
        }
        cudaStreamSynchronize(*stream_);  // what was launched reads the host's memory
        cudaGetLastError();
        throw;
      }
      for (int64_t b = 0; b < batch(); ++b) {
        take(request, b);
        numbers = numbers && control_.host<int32_t>(invalid_at_)[b] == 0;
      }
      done += round;
    }
    if (!numbers) {
      throw Error(Code::kBackend,
                  problem("logits", "no numbers", "finite numbers",
                          "reset the stream; if this is an fp16 bundle that overflows, export with --dtype fp32"));
    }
  }

  const float* logits() override {
    if (!host_logits_are_current_) {
      enter();
      check(cudaMemcpyAsync(host_logits_.data(), logits_.data(), logits_.bytes(), cudaMemcpyDeviceToHost, *stream_),
            "download of logits");
      stream_->synchronize();
      host_logits_are_current_ = true;
    }
    return reinterpret_cast<const float*>(host_logits_.data());
  }

  void writeLogits(const float* logits) override {
    enter();
    std::memcpy(host_logits_.data(), logits, logits_.bytes());
    check(cudaMemcpyAsync(logits_.data(), host_logits_.data(), logits_.bytes(), cudaMemcpyHostToDevice, *stream_),
          "upload of logits");
    stream_->synchronize();
    host_logits_are_current_ = true;
  }

  void readState(size_t state, void* target) const override {
    enter();
    const cuda::Memory& memory = states_.at(state);
    check(cudaMemcpyAsync(target, memory.data(), memory.bytes(), cudaMemcpyDeviceToHost, *stream_),
          "download of a state");
    stream_->synchronize();
  }

  void writeState(size_t state, const void* source) override {
    enter();
    const cuda::Memory& memory = states_.at(state);
    check(cudaMemcpyAsync(memory.data(), source, memory.bytes(), cudaMemcpyHostToDevice, *stream_),
          "upload of a state");
    stream_->synchronize();
  }

  void clearStream(int64_t stream) override {
    enter();
    for (size_t i = 0; i < states_.size(); ++i) {
      const size_t row = static_cast<size_t>(manifest_.states[i].rowBytes());
      zero(states_[i].data() + stream * row, row);
    }
    stream_->synchronize();
  }

  std::vector<const void*> stateBuffers() const override {
    std::vector<const void*> buffers;
    for (const cuda::Memory& state : states_) buffers.push_back(state.data());
    return buffers;
  }

 private:
  // A row of a state that does not lie where TensorRT wants addresses: prefill sees a copy of it.
  struct Detour {
    char* row;
    char* copy;
    size_t bytes;
  };

  TensorrtLibrary& prepared() const {
    cuda::useDevice(device_);
    return TensorrtLibrary::get();
  }

  int64_t batch() const { return manifest_.stream.batch; }
  Engine& decode() { return *engines_.at("decode"); }
  Engine* chunks() { return engines_.count("prefill") != 0 ? engines_.at("prefill").get() : nullptr; }
  void enter() const { check(cudaSetDevice(device_), "cudaSetDevice"); }

  void zero(char* data, size_t bytes) const { check(cudaMemsetAsync(data, 0, bytes, *stream_), "cudaMemset"); }

  // All tensors of an engine, the states with as many rows as it has streams.
  std::vector<TensorSpec> specsOf(const std::string& role) const {
    const GraphSpec& graph = manifest_.graphs.at(role);
    std::vector<TensorSpec> specs = graph.inputs;
    specs.insert(specs.end(), graph.outputs.begin(), graph.outputs.end());
    for (const StateSpec& state : manifest_.states) {
      TensorSpec spec = state.tensor();
      if (role == "prefill") spec.shape[0] = 1;
      specs.push_back(spec);
      spec.name = state.output;
      specs.push_back(spec);
    }
    return specs;
  }

  void allocateBuffers() {
    const size_t b = static_cast<size_t>(batch()), number = wide_ ? 8 : 4;
    const size_t logits_bytes = b * static_cast<size_t>(manifest_.model.vocab_size) * sizeof(float);
    logits_ = cuda::Memory(logits_bytes, "logits");
    raw_logits_ = cuda::Memory(logits_bytes, "logits");
    weights_ = cuda::Memory(logits_bytes, "sampling");
    host_logits_ = cuda::Pinned(logits_bytes);
    for (const StateSpec& state : manifest_.states) {
      const size_t bytes = static_cast<size_t>(state.bytes());
      states_.emplace_back(bytes, "the cache");
      next_.push_back(state.isRecurrent() ? cuda::Memory(bytes, "the cache") : cuda::Memory());
    }
    max_end_ids_ = std::max(kMinEndIds, static_cast<int64_t>(manifest_.model.eos_token_ids.size()));

    Layout layout;
    ids_at_ = layout.add(b * number);
    position_at_ = layout.add(b * 8);
    active_at_ = layout.add(b * sizeof(int32_t));
    inputs_end_ = layout.size();  // so far a step on the host's ids
    sampling_at_ = layout.add(b * sizeof(cuda::DeviceSampling));
    end_ids_at_ = layout.add(static_cast<size_t>(max_end_ids_) * sizeof(int32_t));
    num_end_ids_at_ = layout.add(sizeof(int32_t));
    ended_at_ = layout.add(b * sizeof(int32_t));
    invalid_at_ = layout.add(b * sizeof(int32_t));
    num_ids_at_ = layout.add(b * sizeof(int32_t));
    history_at_ = layout.add(b * kHistory * sizeof(int32_t));
    control_bytes_ = layout.size();
    control_ = Mirror(control_bytes_, "tokens");
    recent_ = Mirror(b * static_cast<size_t>(manifest_.stream.capacity()) * sizeof(int32_t), "tokens");

    sampling_.batch = static_cast<int32_t>(batch());
    sampling_.vocab_size = static_cast<int32_t>(manifest_.model.vocab_size);
    sampling_.capacity = static_cast<int32_t>(manifest_.stream.capacity());
    sampling_.history_size = static_cast<int32_t>(kHistory);
    sampling_.logits = reinterpret_cast<float*>(logits_.data());
    sampling_.raw_logits = reinterpret_cast<const float*>(raw_logits_.data());
    sampling_.scratch = reinterpret_cast<float*>(weights_.data());
    sampling_.ids = control_.device(ids_at_);
    sampling_.position = control_.device(position_at_);
    sampling_.wide = wide_;
    sampling_.marks_idle = manifest_.isRecurrent();
    sampling_.sampling = control_.device<cuda::DeviceSampling>(sampling_at_);
    sampling_.end_ids = control_.device<int32_t>(end_ids_at_);
    sampling_.num_end_ids = control_.device<int32_t>(num_end_ids_at_);
    sampling_.recent_ids = recent_.device<int32_t>(0);
    sampling_.active = control_.device<int32_t>(active_at_);
    sampling_.ended = control_.device<int32_t>(ended_at_);
    sampling_.invalid = control_.device<int32_t>(invalid_at_);
    sampling_.num_ids = control_.device<int32_t>(num_ids_at_);
    sampling_.history = control_.device<int32_t>(history_at_);
  }

  void bindDecode() {
    decode().bind("ids", control_.device(ids_at_));
    decode().bind("position", control_.device(position_at_));
    decode().bind("logits", raw_logits_.data());
    for (size_t i = 0; i < states_.size(); ++i) {
      decode().bind(manifest_.states[i].input, states_[i].data());
      const bool in_place = next_[i].bytes() == 0;
      decode().bind(manifest_.states[i].output, (in_place ? states_[i] : next_[i]).data());
    }
  }

  void bindPrefill() {
    const size_t number = wide_ ? 8 : 4;
    Layout layout;
    chunk_ids_at_ = layout.add(static_cast<size_t>(manifest_.stream.chunk_size) * number);
    chunk_position_at_ = layout.add(8);
    chunk_count_at_ = layout.add(number);
    chunk_bytes_ = layout.size();
    chunk_ = Mirror(chunk_bytes_, "tokens");
    chunk_logits_ = cuda::Memory(static_cast<size_t>(manifest_.model.vocab_size) * sizeof(float), "logits");
    detours_.resize(static_cast<size_t>(batch()));
    size_t copies = 0;  // bytes of detours: those of one stream, used by all in turn
    for (const StateSpec& state : manifest_.states) {
      if (batch() > 1 && state.rowBytes() % cuda::kAlignment != 0)
        copies += aligned(static_cast<size_t>(state.rowBytes()));
    }
    copies_ = cuda::Memory(copies, "the cache");
    chunks()->bind("ids", chunk_.device(chunk_ids_at_));
    chunks()->bind("position", chunk_.device(chunk_position_at_));
    chunks()->bind("num_valid", chunk_.device(chunk_count_at_));
    chunks()->bind("logits", chunk_logits_.data());
  }

  // Tie the prefill engine to one stream's rows.
  void bindPrefill(int64_t stream) {
    std::vector<Detour>& detours = detours_[static_cast<size_t>(stream)];
    detours.clear();
    char* next = copies_.data();
    for (size_t i = 0; i < states_.size(); ++i) {
      const StateSpec& state = manifest_.states[i];
      const size_t bytes = static_cast<size_t>(state.rowBytes());
      char* address = states_[i].data() + static_cast<size_t>(stream) * bytes;
      if (batch() > 1 && bytes % cuda::kAlignment != 0) {
        detours.push_back({address, next, bytes});
        address = next;
        next += aligned(bytes);
      }
      chunks()->bind(state.input, address);
      chunks()->bind(state.output, address);
    }
  }

  void runDecode() {
    decode().run(*stream_);
    for (size_t i = 0; i < states_.size(); ++i) {
      if (next_[i].bytes() != 0) copy(states_[i].data(), next_[i].data(), next_[i].bytes());
    }
  }

  void runStep() {
    control_.upload(0, inputs_end_, *stream_);
    runDecode();
    check(cuda::launchCommit(sampling_, *stream_), "the commit kernel");
  }

  void runToken() {
    check(cuda::launchSample(sampling_, *stream_), "the sampling kernel");
    runDecode();
    check(cuda::launchCommit(sampling_, *stream_), "the commit kernel");
  }

  void runPrefill(int64_t stream) {
    chunk_.upload(0, chunk_bytes_, *stream_);
    const std::vector<Detour>& detours = detours_[static_cast<size_t>(stream)];
    for (const Detour& each : detours) copy(each.copy, each.row, each.bytes);
    chunks()->run(*stream_);
    for (const Detour& each : detours) copy(each.row, each.copy, each.bytes);
    copy(logits_.data() + static_cast<size_t>(stream) * chunk_logits_.bytes(), chunk_logits_.data(),
         chunk_logits_.bytes());
  }

  void copy(char* target, const char* source, size_t bytes) const {
    check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, *stream_), "cudaMemcpy");
  }

  // The first run of a context does work of its own that cannot be recorded: have it behind us. Positions are 0.
  void recordGraphs() {
    prepareGreedy();
    runStep();
    runToken();
    stream_->synchronize();
    step_graph_.capture(*stream_, [this] { runStep(); });
    token_graph_.capture(*stream_, [this] { runToken(); });
    if (chunks() == nullptr) return;
    writeNumber(chunk_.host(chunk_count_at_), wide_, 0, 1);
    chunk_graphs_.resize(static_cast<size_t>(batch()));
    for (int64_t s = 0; s < batch(); ++s) {
      bindPrefill(s);
      runPrefill(s);
      stream_->synchronize();
      chunk_graphs_[static_cast<size_t>(s)].capture(*stream_, [this, s] { runPrefill(s); });
    }
    library_.logger().takeErrors();
  }

  void prepareGreedy() {
    for (int64_t b = 0; b < batch(); ++b) {
      control_.host<cuda::DeviceSampling>(sampling_at_)[b] = {1.0, 0.0f, 1.0f, 0, 0};
    }
    control_.upload(0, history_at_, *stream_);
  }

  void prepareSampling(const StepsRequest& request) {
    if (request.num_end_ids > max_end_ids_) {
      throw Error(Code::kUsage, problem("end tokens", std::to_string(request.num_end_ids),
                                        "at most " + std::to_string(max_end_ids_), "pass fewer"));
    }
    bool looks_back = false;
    for (int64_t b = 0; b < batch(); ++b) {
      const SamplingParams& params = request.sampling[b];
      const int64_t vocab_size = manifest_.model.vocab_size;
      control_.host<cuda::DeviceSampling>(sampling_at_)[b] = {
          params.top_p, static_cast<float>(params.temperature), static_cast<float>(params.repetition_penalty),
          params.seed.value_or(0), static_cast<int32_t>(params.top_k < vocab_size ? params.top_k : 0)};
      looks_back = looks_back || params.repetition_penalty != 1.0;
    }
    for (int64_t i = 0; i < request.num_end_ids; ++i) {
      control_.host<int32_t>(end_ids_at_)[i] = static_cast<int32_t>(request.end_ids[i]);
    }
    *control_.host<int32_t>(num_end_ids_at_) = static_cast<int32_t>(request.num_end_ids);
    if (!looks_back) return;  // the device's copy may be stale then: nobody reads it
    const size_t size = static_cast<size_t>(batch() * manifest_.stream.capacity());
    for (size_t i = 0; i < size; ++i) recent_.host<int32_t>(0)[i] = static_cast<int32_t>(request.recent_ids[i]);
    recent_.upload(0, size * sizeof(int32_t), *stream_);
  }

  bool allEnded(const StepsRequest& request) const {
    return std::all_of(request.ended, request.ended + batch(), [](bool ended) { return ended; });
  }

  // Bring a round's tokens of one stream to the caller.
  void take(const StepsRequest& request, int64_t b) {
    const int32_t* fed = control_.host<int32_t>(history_at_) + b * kHistory;
    const int64_t count = control_.host<int32_t>(num_ids_at_)[b], capacity = manifest_.stream.capacity();
    for (int64_t i = 0; i < count; ++i) {
      request.ids[b * request.count + request.num_ids[b]++] = fed[i];
      request.recent_ids[b * capacity + request.positions[b]++ % capacity] = fed[i];
    }
    request.ended[b] = control_.host<int32_t>(ended_at_)[b] != 0;
  }

  const int device_;
  TensorrtLibrary& library_;
  const bool wide_;  // 64-bit ids and positions: graphs without the plugin
  std::unique_ptr<cuda::Stream> stream_;
  Allocator allocator_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  cuda::Memory scratch_;
  std::map<std::string, std::unique_ptr<Engine>> engines_;

  std::vector<cuda::Memory> states_;  // as Manifest::states
  // What a step makes of them, where it must not write to what it reads: TensorRT promises nothing of the order within
  // an engine but where an operator is made for it. Empty: written in place.
  std::vector<cuda::Memory> next_;
  cuda::Memory logits_;      // float32 [B, vocab] after each stream's last token
  cuda::Memory raw_logits_;  // the same as the engine writes it, idle streams included
  cuda::Memory weights_;     // float32 [B, vocab], scratch of sampling
  cuda::Pinned host_logits_;
  bool host_logits_are_current_ = false;

  // Offsets into `control_`.
  size_t ids_at_ = 0, position_at_ = 0, active_at_ = 0, inputs_end_ = 0, sampling_at_ = 0, end_ids_at_ = 0;
  size_t num_end_ids_at_ = 0, ended_at_ = 0, invalid_at_ = 0, num_ids_at_ = 0, history_at_ = 0, control_bytes_ = 0;
  Mirror control_;
  Mirror recent_;  // int32 [B, C]
  int64_t max_end_ids_ = 0;
  cuda::SamplingArgs sampling_{};

  size_t chunk_ids_at_ = 0, chunk_position_at_ = 0, chunk_count_at_ = 0, chunk_bytes_ = 0;  // offsets into `chunk_`
  Mirror chunk_;
  cuda::Memory chunk_logits_;  // float32 [vocab]
  cuda::Memory copies_;
  std::vector<std::vector<Detour>> detours_;  // by stream

  cuda::Graph step_graph_, token_graph_;
  std::vector<cuda::Graph> chunk_graphs_;  // by stream
};

}  // namespace

std::unique_ptr<Backend> loadTensorrtBackend(const std::string& bundle, const Manifest& manifest,
                                             const BackendOptions& options) {
  return std::make_unique<TensorrtBackend>(bundle, manifest, options);
}

}  // namespace sinkrt
