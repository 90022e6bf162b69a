// Builds a bundle's engines with the plugin and decodes given tokens on a GPU: what a test compares logits of.
//
//   run_engine BUNDLE PLUGIN TOKENS LOGITS BATCH VOCAB PREFILL CHUNK [separate]
//
// TOKENS: int32 [N, B]. The first PREFILL of each stream go through prefill.onnx in chunks of CHUNK, if there are any,
// the others through decode.onnx. LOGITS: float32 [N - PREFILL + (PREFILL > 0), B, VOCAB], after the prompt and after
// each step. separate: states' inputs and outputs get buffers of their own, which take turns; otherwise they share one.
// Needs TensorRT 8.5 or newer. Prints one line of facts; exits with 1 after one line on what went wrong.
#include <NvInfer.h>
#include <NvOnnxParser.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

[[noreturn]] void fail(const std::string& line) {
  std::fprintf(stderr, "run_engine: %s\n", line.c_str());
  std::exit(1);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(cudaGetErrorString(error));
}

struct Logger : ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR) std::fprintf(stderr, "TensorRT: %s\n", text);
  }
} logger;

size_t bytesOf(const Dims& dims, DataType type) {
  size_t size = type == DataType::kINT8 || type == DataType::kBOOL ? 1 : type == DataType::kHALF ? 2 : 4;
  for (int32_t i = 0; i < dims.nbDims; ++i) size *= dims.d[i];
  return size;
}

bool endsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

#if NV_TENSORRT_MAJOR < 10
// Weakly typed: FP16 is allowed, and what the graph computes in float32 is held there (sinkexport.engine does the same):
// the values named in GRAPH.float32, one a line: sinkexport.engine.float32_values(GRAPH).
void setPrecision(INetworkDefinition& network, IBuilderConfig& config, const std::string& graph) {
  std::set<std::string> float_names;
  std::ifstream file(graph + ".float32");
  for (std::string name; std::getline(file, name);) float_names.insert(name);
  config.setFlag(BuilderFlag::kFP16);
  config.setFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
  int held = 0;
  for (int32_t i = 0; i < network.getNbLayers(); ++i) {
    ILayer* layer = network.getLayer(i);
    if (layer->getNbOutputs() != 1 || float_names.count(layer->getOutput(0)->getName()) == 0) continue;
    layer->setPrecision(DataType::kFLOAT);
    layer->setOutputType(0, DataType::kFLOAT);
    ++held;
  }
  std::printf("%d layers, %d held in float32; ", network.getNbLayers(), held);
  for (int32_t i = 0; i < network.getNbInputs() + network.getNbOutputs(); ++i) {
    ITensor* tensor = i < network.getNbInputs() ? network.getInput(i) : network.getOutput(i - network.getNbInputs());
    if (tensor->getType() != DataType::kINT8) continue;
    config.setFlag(BuilderFlag::kINT8);
    tensor->setDynamicRange(-127.0f, 127.0f);  // it only passes through; TensorRT wants some range
  }
}
#endif

std::vector<char> build(const std::string& graph) {
  std::unique_ptr<IBuilder> builder(createInferBuilder(logger));
#if NV_TENSORRT_MAJOR >= 10
  const uint32_t flags = 1U << static_cast<uint32_t>(NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
#else
  const uint32_t flags = 1U << static_cast<uint32_t>(NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
#endif
  std::unique_ptr<INetworkDefinition> network(builder->createNetworkV2(flags));
  std::unique_ptr<nvonnxparser::IParser> parser(nvonnxparser::createParser(*network, logger));
  if (!parser->parseFromFile(graph.c_str(), static_cast<int>(ILogger::Severity::kERROR))) {
    fail(graph + ": " + (parser->getNbErrors() > 0 ? parser->getError(0)->desc() : "not parsed"));
  }
  std::unique_ptr<IBuilderConfig> config(builder->createBuilderConfig());
  config->setMemoryPoolLimit(MemoryPoolType::kWORKSPACE, size_t{1} << 30);
#if NV_TENSORRT_MAJOR >= 10
  config->setPreviewFeature(PreviewFeature::kALIASED_PLUGIN_IO_10_03, true);
#else
  config->setTacticSources(0);  // no cuBLAS, no cuDNN
  setPrecision(*network, *config, graph);
#endif
  std::unique_ptr<IHostMemory> plan(builder->buildSerializedNetwork(*network, *config));
  if (plan == nullptr) fail(graph + ": not built");
  const auto* data = static_cast<const char*>(plan->data());
  return {data, data + plan->size()};
}

using Buffers = std::map<std::string, char*>;

struct Engine {
  std::unique_ptr<ICudaEngine> engine;
  std::unique_ptr<IExecutionContext> context;

  Engine(IRuntime& runtime, const std::string& graph) {
    const std::vector<char> plan = build(graph);
    std::printf("%s %.1f MB; ", graph.substr(graph.rfind('/') + 1).c_str(), plan.size() / 1e6);
    engine.reset(runtime.deserializeCudaEngine(plan.data(), plan.size()));
    if (engine == nullptr) fail(graph + ": not deserialised");
    context.reset(engine->createExecutionContext());
  }

  size_t bytes(const std::string& name) const {
    return bytesOf(engine->getTensorShape(name.c_str()), engine->getTensorDataType(name.c_str()));
  }

  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (int32_t i = 0; i < engine->getNbIOTensors(); ++i) result.emplace_back(engine->getIOTensorName(i));
    return result;
  }

  void bind(const std::string& name, void* address) {
    if (!context->setTensorAddress(name.c_str(), address)) fail(name + ": address not taken");
  }

  void run(cudaStream_t stream) {
    if (!context->enqueueV3(stream)) fail("run refused");
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 9) fail("received too few arguments, expected BUNDLE PLUGIN TOKENS LOGITS BATCH VOCAB PREFILL CHUNK");
  const std::string bundle = argv[1];
  const int batch = std::atoi(argv[5]), vocab = std::atoi(argv[6]), prefill = std::atoi(argv[7]), chunk = std::atoi(argv[8]);
  const bool separate = argc > 9 && std::string(argv[9]) == "separate";
#if NV_TENSORRT_MAJOR >= 10
  if (getPluginRegistry()->loadLibrary(argv[2]) == nullptr) fail(std::string(argv[2]) + ": not loaded");
#else
  if (dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) fail(dlerror());
#endif

  std::ifstream file(argv[3], std::ios::binary);
  const std::vector<char> raw{std::istreambuf_iterator<char>(file), {}};
  std::vector<int32_t> tokens(raw.size() / 4);  // [N, B]
  std::memcpy(tokens.data(), raw.data(), raw.size());
  const int num_tokens = static_cast<int>(tokens.size()) / batch;

  std::unique_ptr<IRuntime> runtime(createInferRuntime(logger));
  Engine decode(*runtime, bundle + "/decode.onnx");
  std::unique_ptr<Engine> chunks;
  if (prefill > 0) chunks = std::make_unique<Engine>(*runtime, bundle + "/prefill.onnx");

  Buffers buffers, others;
  for (const std::string& name : decode.names()) {
    if (endsWith(name, ".next")) continue;
    for (Buffers* each : {&buffers, &others}) {
      check(cudaMalloc(reinterpret_cast<void**>(&(*each)[name]), decode.bytes(name)));
      check(cudaMemset((*each)[name], 0, decode.bytes(name)));
    }
  }
  int32_t* chunk_inputs = nullptr;  // ids [T], position [2], num_valid [1], each on 256 bytes of its own
  const size_t ids_bytes = (chunk * 4 + 255) / 256 * 256;
  check(cudaMalloc(reinterpret_cast<void**>(&chunk_inputs), ids_bytes + 512));

  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  std::ofstream out(argv[4], std::ios::binary);
  std::vector<float> logits(static_cast<size_t>(batch) * vocab);
  const auto keep = [&] {
    check(cudaMemcpyAsync(logits.data(), buffers["logits"], logits.size() * 4, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    out.write(reinterpret_cast<const char*>(logits.data()), static_cast<std::streamsize>(logits.size() * 4));
  };

  for (int s = 0; s < batch && prefill > 0; ++s) {  // a row of each state
    for (const std::string& name : chunks->names()) {
      if (name == "ids" || name == "position" || name == "num_valid") continue;
      const std::string state = endsWith(name, ".next") ? name.substr(0, name.size() - 5) : name;
      chunks->bind(name, buffers[state] + s * chunks->bytes(name));
    }
    chunks->bind("ids", chunk_inputs);
    chunks->bind("position", reinterpret_cast<char*>(chunk_inputs) + ids_bytes);
    chunks->bind("num_valid", reinterpret_cast<char*>(chunk_inputs) + ids_bytes + 256);
    for (int start = 0; start < prefill; start += chunk) {
      const int count = std::min(chunk, prefill - start);
      std::vector<int32_t> ids(chunk, 0);
      for (int i = 0; i < count; ++i) ids[i] = tokens[(start + i) * batch + s];
      const int32_t position[2] = {start >> 16, start & 0xffff};
      check(cudaMemcpy(chunk_inputs, ids.data(), chunk * 4, cudaMemcpyHostToDevice));
      check(cudaMemcpy(reinterpret_cast<char*>(chunk_inputs) + ids_bytes, position, 8, cudaMemcpyHostToDevice));
      check(cudaMemcpy(reinterpret_cast<char*>(chunk_inputs) + ids_bytes + 256, &count, 4, cudaMemcpyHostToDevice));
      chunks->run(stream);
      check(cudaStreamSynchronize(stream));
    }
  }
  if (prefill > 0) keep();

  for (int t = prefill; t < num_tokens; ++t) {
    for (const std::string& name : decode.names()) {
      const bool is_next = endsWith(name, ".next");
      const std::string state = is_next ? name.substr(0, name.size() - 5) : name;
      decode.bind(name, is_next && separate ? others[state] : buffers[state]);
    }
    std::vector<int32_t> positions;
    for (int s = 0; s < batch; ++s) positions.insert(positions.end(), {t >> 16, t & 0xffff});
    check(cudaMemcpy(buffers["ids"], &tokens[static_cast<size_t>(t) * batch], batch * 4, cudaMemcpyHostToDevice));
    check(cudaMemcpy(buffers["position"], positions.data(), batch * 8, cudaMemcpyHostToDevice));
    decode.run(stream);
    keep();
    if (separate) {
      for (const std::string& name : decode.names()) {
        if (endsWith(name, ".next")) std::swap(buffers[name.substr(0, name.size() - 5)], others[name.substr(0, name.size() - 5)]);
      }
    }
  }

  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  decode.run(stream);
  check(cudaStreamEndCapture(stream, &graph));
#if CUDART_VERSION >= 12000
  check(cudaGraphInstantiate(&replay, graph, 0));
#else
  check(cudaGraphInstantiate(&replay, graph, nullptr, nullptr, 0));
#endif
  constexpr int kRuns = 50;
  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(replay, stream));
  check(cudaEventRecord(start, stream));
  for (int i = 0; i < kRuns; ++i) check(cudaGraphLaunch(replay, stream));
  check(cudaEventRecord(end, stream));
  check(cudaEventSynchronize(end));
  float ms = 0.0f;
  check(cudaEventElapsedTime(&ms, start, end));
  std::printf("%d tokens, %.3f ms/step in a CUDA graph\n", num_tokens, ms / kRuns);
  return 0;
}
