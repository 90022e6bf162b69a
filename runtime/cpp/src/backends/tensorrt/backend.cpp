// TensorRT engines with everything allocated at load. A step is one CUDA graph: upload of ids and positions, engine,
// commit of the logits; in `steps` a token is one graph too, sampling included, and the host waits only at the end.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/tensorrt/buffers.h"
#include "backends/tensorrt/engine.h"
#include "backends/tensorrt/library.h"
#include "backends/tensorrt/prefill.h"
#include "bundle/engines.h"
#include "cuda/device.h"
#include "cuda/sampling.h"
#include "sinkrt/backend.h"

namespace sinkrt {
namespace {

using cuda::check;

class TensorrtBackend final : public Backend {
 public:
  TensorrtBackend(const std::string& bundle, const Manifest& manifest, const BackendOptions& options)
      : Backend(manifest), device_(options.device), library_(prepared()), integers_(!hasTensorrtPlugin(manifest)) {
    EngineHost host{TensorrtLibrary::flavour(), library_.version(), {}, cuda::computeCapability(device_)};
    if (hasTensorrtPlugin(manifest)) {
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

    buffers_ = std::make_unique<Buffers>(manifest, integers_);
    sampling_ = buffers_->samplingArgs(manifest);
    bindDecode();
    if (engines_.count("prefill") != 0) {
      prefill_ = std::make_unique<Prefill>(*engines_.at("prefill"), manifest, *buffers_, *stream_);
    }
    recordGraphs();
    for (const cuda::Memory& state : buffers_->states) zero(state.data(), state.bytes());
    zero(buffers_->logits.data(), buffers_->logits.bytes());
    stream_->synchronize();
  }

  ~TensorrtBackend() override { cudaSetDevice(device_); }

  const char* name() const override { return "tensorrt"; }

  void step(const int64_t* ids, const int64_t* positions, const bool* active) override {
    enter();
    for (int64_t b = 0; b < batch(); ++b) {
      integers_.writeNumber(control().host(fields().ids), b, idFor(ids[b], active[b]));
      integers_.writePosition(control().host(fields().position), b, positions[b]);
      control().host(fields().active)[b] = active[b];
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
    host_logits_are_current_ = false;
    prefill_->run(stream, ids, count, position);
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
      const int64_t round = std::min(request.count - done, roundSize());
      for (int64_t b = 0; b < batch(); ++b) {
        integers_.writePosition(control().host(fields().position), b, request.positions[b]);
        control().host(fields().ended)[b] = request.ended[b];
        control().host(fields().invalid)[b] = 0;
        control().host(fields().num_ids)[b] = 0;
      }
      try {
        control().upload(0, fields().endOfRound(), *stream_);
        for (int64_t i = 0; i < round; ++i) {
          if (token_graph_) {
            token_graph_.launch(*stream_);
          } else {
            runToken();
          }
        }
        control().download(fields().beginOfResults(), fields().size, *stream_);
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
        numbers = numbers && control().host(fields().invalid)[b] == 0;
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
      check(cudaMemcpyAsync(buffers_->host_logits.data(), buffers_->logits.data(), buffers_->logits.bytes(),
                            cudaMemcpyDeviceToHost, *stream_),
            "download of logits");
      stream_->synchronize();
      host_logits_are_current_ = true;
    }
    return reinterpret_cast<const float*>(buffers_->host_logits.data());
  }

  void writeLogits(const float* logits) override {
    enter();
    std::memcpy(buffers_->host_logits.data(), logits, buffers_->logits.bytes());
    check(cudaMemcpyAsync(buffers_->logits.data(), buffers_->host_logits.data(), buffers_->logits.bytes(),
                          cudaMemcpyHostToDevice, *stream_),
          "upload of logits");
    stream_->synchronize();
    host_logits_are_current_ = true;
  }

  void readState(size_t state, void* target) const override {
    enter();
    const cuda::Memory& memory = buffers_->states.at(state);
    check(cudaMemcpyAsync(target, memory.data(), memory.bytes(), cudaMemcpyDeviceToHost, *stream_),
          "download of a state");
    stream_->synchronize();
  }

  void writeState(size_t state, const void* source) override {
    enter();
    const cuda::Memory& memory = buffers_->states.at(state);
    check(cudaMemcpyAsync(memory.data(), source, memory.bytes(), cudaMemcpyHostToDevice, *stream_),
          "upload of a state");
    stream_->synchronize();
  }

  void clearStream(int64_t stream) override {
    enter();
    for (size_t i = 0; i < buffers_->states.size(); ++i) {
      const size_t row = static_cast<size_t>(manifest_.states[i].rowBytes());
      zero(buffers_->states[i].data() + stream * row, row);
    }
    stream_->synchronize();
  }

  std::vector<const void*> stateBuffers() const override {
    std::vector<const void*> buffers;
    for (const cuda::Memory& state : buffers_->states) buffers.push_back(state.data());
    return buffers;
  }

 private:
  TensorrtLibrary& prepared() const {
    cuda::useDevice(device_);
    return TensorrtLibrary::get();
  }

  int64_t batch() const { return manifest_.stream.batch; }
  const Mirror& control() const { return buffers_->control; }
  const ControlFields& fields() const { return buffers_->fields; }
  int64_t roundSize() const { return fields().history.shape[1]; }  // tokens of a stream before the host looks at them
  Engine& decode() { return *engines_.at("decode"); }
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

  void bindDecode() {
    decode().bind("ids", control().device(fields().ids));
    decode().bind("position", control().device(fields().position));
    decode().bind("logits", buffers_->raw_logits.data());
    for (size_t i = 0; i < buffers_->states.size(); ++i) {
      const cuda::Memory &state = buffers_->states[i], &next = buffers_->next[i];
      decode().bind(manifest_.states[i].input, state.data());
      decode().bind(manifest_.states[i].output, (next.bytes() == 0 ? state : next).data());
    }
  }

  void runDecode() {
    decode().run(*stream_);
    for (size_t i = 0; i < buffers_->states.size(); ++i) {
      const cuda::Memory& next = buffers_->next[i];
      if (next.bytes() != 0) cuda::copy(buffers_->states[i].data(), next.data(), next.bytes(), *stream_);
    }
  }

  void runStep() {
    control().upload(0, fields().endOfStep(), *stream_);
    runDecode();
    check(cuda::launchCommit(sampling_, *stream_), "the commit kernel");
  }

  void runToken() {
    check(cuda::launchSample(sampling_, *stream_), "the sampling kernel");
    runDecode();
    check(cuda::launchCommit(sampling_, *stream_), "the commit kernel");
  }

  // The first run of a context does work that cannot be recorded, so it comes before. Positions are 0.
  void recordGraphs() {
    prepareGreedy();
    runStep();
    runToken();
    stream_->synchronize();
    step_graph_.capture(*stream_, [this] { runStep(); });
    token_graph_.capture(*stream_, [this] { runToken(); });
    if (prefill_ != nullptr) prefill_->record();
    library_.logger().takeErrors();
  }

  void prepareGreedy() {
    for (int64_t b = 0; b < batch(); ++b) {
      control().host(fields().sampling)[b] = cuda::deviceSampling(SamplingParams(), manifest_.model.vocab_size);
    }
    control().upload(0, fields().endOfRound(), *stream_);
  }

  void prepareSampling(const StepsRequest& request) {
    if (request.num_end_ids > buffers_->most_end_ids) {
      throw Error(Code::kUsage, problem("end tokens", std::to_string(request.num_end_ids),
                                        "at most " + std::to_string(buffers_->most_end_ids), "pass fewer"));
    }
    bool looks_back = false;
    for (int64_t b = 0; b < batch(); ++b) {
      const SamplingParams& params = request.sampling[b];
      control().host(fields().sampling)[b] = cuda::deviceSampling(params, manifest_.model.vocab_size);
      looks_back = looks_back || params.repetition_penalty != 1.0;
    }
    for (int64_t i = 0; i < request.num_end_ids; ++i) {
      control().host(fields().end_ids)[i] = static_cast<int32_t>(request.end_ids[i]);
    }
    *control().host(fields().num_end_ids) = static_cast<int32_t>(request.num_end_ids);
    if (!looks_back) return;  // the device's copy may be stale then: no kernel reads it
    const size_t size = static_cast<size_t>(batch() * manifest_.stream.capacity());
    int32_t* recent = buffers_->recent.host(buffers_->recent_ids);
    for (size_t i = 0; i < size; ++i) recent[i] = static_cast<int32_t>(request.recent_ids[i]);
    buffers_->recent.upload(0, buffers_->recent_ids.bytes(), *stream_);
  }

  bool allEnded(const StepsRequest& request) const {
    return std::all_of(request.ended, request.ended + batch(), [](bool ended) { return ended; });
  }

  // Bring a round's tokens of one stream to the caller.
  void take(const StepsRequest& request, int64_t b) {
    const int32_t* fed = control().host(fields().history) + b * roundSize();
    const int64_t count = control().host(fields().num_ids)[b], capacity = manifest_.stream.capacity();
    for (int64_t i = 0; i < count; ++i) {
      request.ids[b * request.count + request.num_ids[b]++] = fed[i];
      request.recent_ids[b * capacity + request.positions[b]++ % capacity] = fed[i];
    }
    request.ended[b] = control().host(fields().ended)[b] != 0;
  }

  const int device_;
  TensorrtLibrary& library_;
  const GraphIntegers integers_;
  std::unique_ptr<cuda::Stream> stream_;
  Allocator allocator_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  cuda::Memory scratch_;
  std::map<std::string, std::unique_ptr<Engine>> engines_;

  std::unique_ptr<Buffers> buffers_;
  cuda::SamplingArgs sampling_{};
  bool host_logits_are_current_ = false;

  std::unique_ptr<Prefill> prefill_;  // none: the bundle has no such graph
  cuda::Graph step_graph_, token_graph_;
};

}  // namespace

std::unique_ptr<Backend> loadTensorrtBackend(const std::string& bundle, const Manifest& manifest,
                                             const BackendOptions& options) {
  return std::make_unique<TensorrtBackend>(bundle, manifest, options);
}

}  // namespace sinkrt
