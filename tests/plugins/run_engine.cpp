// Decodes given tokens with a bundle's decode engine, states in buffers of their own that take turns as input and
// output: what TensorRT allows and libsinkrt never does. The plugin then copies each state first.
//
//   run_engine BUNDLE TOKENS LOGITS
//
// TOKENS: int32 [N, B]. LOGITS: float32 [N, B, vocab]. The engine is one that sinkrt_build wrote, for a bundle with the
// plugin. Exits with 1 after one line on what went wrong.
#include <cuda_runtime_api.h>
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/tensorrt/library.h"
#include "sinkrt/manifest.h"

namespace {

void check(bool ok, const std::string& what) {
  if (!ok) throw sinkrt::Error(sinkrt::Code::kBackend, what);
}

std::vector<char> contentOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  check(static_cast<bool>(file), path + ": not there");
  return {std::istreambuf_iterator<char>(file), {}};
}

char* allocated(int64_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<size_t>(bytes)) == cudaSuccess, "too little GPU memory");
  check(cudaMemset(memory, 0, static_cast<size_t>(bytes)) == cudaSuccess, "cudaMemset");
  return static_cast<char*>(memory);
}

void run(const std::string& bundle, const std::string& tokens_file, const std::string& logits_file) {
  const sinkrt::Manifest manifest = sinkrt::loadManifest(bundle);
  sinkrt::TensorrtLibrary& library = sinkrt::TensorrtLibrary::get();
  library.loadPlugin("", bundle + "/engines/libsinkexport_plugin.so");
  const std::unique_ptr<nvinfer1::IRuntime> runtime(library.createRuntime());
  const std::vector<char> plan = contentOf(bundle + "/" + manifest.engines->at("decode").file);
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  check(engine != nullptr, "engine: " + library.logger().takeErrors());
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  check(context != nullptr, "context: " + library.logger().takeErrors());

  std::map<std::string, char*> buffers, others;  // of inputs and logits by name; others: of the states' outputs
  const sinkrt::GraphSpec& graph = manifest.graphs.at("decode");
  for (const auto* specs : {&graph.inputs, &graph.outputs}) {
    for (const sinkrt::TensorSpec& spec : *specs) buffers[spec.name] = allocated(spec.bytes());
  }
  for (const sinkrt::StateSpec& state : manifest.states) {
    buffers[state.input] = allocated(state.bytes());
    others[state.input] = allocated(state.bytes());
  }
  const std::vector<char> tokens = contentOf(tokens_file);
  const size_t ids_bytes = static_cast<size_t>(manifest.stream.batch) * 4;
  std::vector<char> logits(static_cast<size_t>(graph.outputs.at(0).bytes()));
  std::vector<int32_t> positions(static_cast<size_t>(manifest.stream.batch) * 2);
  std::ofstream out(logits_file, std::ios::binary);
  for (size_t t = 0; t < tokens.size() / ids_bytes; ++t) {
    for (size_t b = 0; b < positions.size(); b += 2) {
      positions[b] = static_cast<int32_t>(t >> 16);
      positions[b + 1] = static_cast<int32_t>(t & 0xffff);
    }
    for (const auto& [name, buffer] : buffers) {
      if (others.count(name) == 0) check(context->setTensorAddress(name.c_str(), buffer), name + ": address refused");
    }
    for (const sinkrt::StateSpec& state : manifest.states) {
      check(context->setTensorAddress(state.input.c_str(), buffers[state.input]) &&
                context->setTensorAddress(state.output.c_str(), others[state.input]),
            state.input + ": address refused");
    }
    cudaMemcpy(buffers["ids"], tokens.data() + t * ids_bytes, ids_bytes, cudaMemcpyHostToDevice);
    cudaMemcpy(buffers["position"], positions.data(), positions.size() * 4, cudaMemcpyHostToDevice);
    check(context->enqueueV3(nullptr), "run: " + library.logger().takeErrors());
    check(cudaMemcpy(logits.data(), buffers["logits"], logits.size(), cudaMemcpyDeviceToHost) == cudaSuccess, "run");
    out.write(logits.data(), static_cast<std::streamsize>(logits.size()));
    for (const sinkrt::StateSpec& state : manifest.states) std::swap(buffers[state.input], others[state.input]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    check(argc == 4, "received other words than BUNDLE TOKENS LOGITS");
    run(argv[1], argv[2], argv[3]);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_engine: %s\n", error.what());
    return 1;
  }
}
