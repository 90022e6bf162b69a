// sinkrt_build: engines of a bundle's graphs, and their entries in its manifest: what 'sinkexport build' does, where
// there is no Python or none of TensorRT's.
//
//   sinkrt_build BUNDLE [--plugin FILE] [--workspace MIB] [--tactic-sources BITS] [--timing-cache FILE] [--verbose]
//
// --tactic-sources: nvinfer1::TacticSource bits; 0 builds without cuBLAS and cuDNN (TensorRT 8). --timing-cache: what
// was measured is kept there, and not measured again. --verbose: every message of TensorRT on stderr, with the time.
// TensorRT is found as libsinkrt finds it; the parser likewise, or at $SINKRT_ONNX_PARSER. Exit codes: 0; 2 after one
// line of what is wrong.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <NvInfer.h>
#include <NvOnnxParser.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/tensorrt/library.h"
#include "bundle/engines.h"
#include "files.h"
#include "sinkrt/manifest.h"
#include "weak_types.h"

using namespace nvinfer1;
using sinkrt::Code;
using sinkrt::Error;
using sinkrt::problem;

namespace {

struct Options {
  std::string bundle;
  std::string plugin;
  std::optional<size_t> workspace_bytes;
  std::optional<uint32_t> tactic_sources;
  std::string timing_cache;
  bool verbose = false;
};

Error unusable(const std::string& what, const std::string& received, const std::string& expected) {
  return {Code::kUsage, problem(what, received, expected, "see tools/build_engine.cpp")};
}

uint64_t number(const std::string& option, const std::string& text, uint64_t largest) {
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos && text.size() < 20;
  const uint64_t value = digits ? std::stoull(text) : 0;
  if (!digits || value > largest) throw unusable(option, "'" + text + "'", "0 .. " + std::to_string(largest));
  return value;
}

Options parsed(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0 && options.bundle.empty()) {
      options.bundle = word;
      continue;
    }
    if (word == "--verbose") {
      options.verbose = true;
      continue;
    }
    if (i + 1 >= argc) throw unusable("arguments", "'" + word + "'", "BUNDLE and options with a value each");
    const char* value = argv[++i];
    if (word == "--plugin") {
      options.plugin = value;
    } else if (word == "--workspace") {
      options.workspace_bytes = number(word, value, SIZE_MAX >> 20) << 20;
    } else if (word == "--tactic-sources") {
      options.tactic_sources = static_cast<uint32_t>(number(word, value, UINT32_MAX));
    } else if (word == "--timing-cache") {
      options.timing_cache = value;
    } else {
      throw unusable("arguments", "'" + word + "'",
                     "--plugin, --workspace, --tactic-sources, --timing-cache or --verbose");
    }
  }
  if (options.bundle.empty()) throw unusable("arguments", "no bundle", "a bundle's folder");
  return options;
}

// As Python's `write_whole`: the file appears whole or not at all.
void writeWhole(const std::string& path, const void* data, size_t size) {
  const std::string partial = path + ".partial";
  std::ofstream file(partial, std::ios::binary | std::ios::trunc);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  file.close();
  if (!file || std::rename(partial.c_str(), path.c_str()) != 0) {
    unlink(partial.c_str());
    throw Error(Code::kUsage, problem("output", "'" + path + "', which cannot be written",
                                      "a writable folder with room", "free some space"));
  }
}

std::string contentOf(const std::string& path) {
  std::string content;
  if (sinkrt::readFile(path, content)) return content;
  throw Error(Code::kUsage,
              problem("'" + path + "'", content, "a readable file", "check the path and its permissions"));
}

// libnvonnxparser, found when the program runs.
class Parser {
 public:
  Parser() {
#if defined(SINKRT_TENSORRT_RTX)
    const std::string name = "libtensorrt_onnxparser_rtx.so.1";
#else
    const std::string name = "libnvonnxparser.so." + std::to_string(NV_TENSORRT_MAJOR);
#endif
    const char* path = std::getenv("SINKRT_ONNX_PARSER");
    void* library = dlopen(path != nullptr ? path : name.c_str(), RTLD_NOW);
    create_ = library == nullptr
                  ? nullptr
                  : reinterpret_cast<void* (*)(void*, void*, int)>(dlsym(library, "createNvOnnxParser_INTERNAL"));
    if (create_ == nullptr) {
      throw Error(Code::kBackend, problem("TensorRT's ONNX parser", dlerror(), name,
                                          "add its folder to LD_LIBRARY_PATH, or set SINKRT_ONNX_PARSER to its path"));
    }
  }

  std::unique_ptr<nvonnxparser::IParser> parse(INetworkDefinition& network, ILogger& logger,
                                               const std::string& graph) const {
    std::unique_ptr<nvonnxparser::IParser> parser(
        static_cast<nvonnxparser::IParser*>(create_(&network, &logger, NV_ONNX_PARSER_VERSION)));
    if (parser == nullptr) throw Error(Code::kBackend, "TensorRT's ONNX parser: received none, expected one");
    if (parser->parseFromFile(graph.c_str(), static_cast<int>(ILogger::Severity::kERROR))) return parser;
    std::string errors;
    for (int32_t i = 0; i < parser->getNbErrors() && i < 8; ++i) {
      errors += std::string(i > 0 ? " / " : "") + "node " + std::to_string(parser->getError(i)->node()) + ": " +
                parser->getError(i)->desc();
    }
    throw Error(Code::kBackend, problem("'" + graph + "'", errors, "a graph that TensorRT parses",
                                        "copy the whole bundle; report it with the graph if that does not help"));
  }

 private:
  void* (*create_)(void*, void*, int) = nullptr;
};

// What was measured before, if `path` names a file. TensorRT reports one that does not fit, and starts without.
std::unique_ptr<ITimingCache> timingCache(IBuilderConfig& config, const std::string& path) {
  if (path.empty()) return nullptr;
  std::string kept;
  if (!sinkrt::readFile(path, kept)) kept.clear();
  std::unique_ptr<ITimingCache> cache(config.createTimingCache(kept.data(), kept.size()));
  if (cache == nullptr || !config.setTimingCache(*cache, false)) {
    cache.reset(config.createTimingCache(nullptr, 0));
    if (cache != nullptr) config.setTimingCache(*cache, false);
  }
  return cache;
}

std::unique_ptr<IHostMemory> build(sinkrt::TensorrtLibrary& library, const Parser& parsers, const std::string& graph,
                                   const Options& options, bool has_plugins) {
  const auto create = reinterpret_cast<void* (*)(void*, int32_t)>(library.symbol("createInferBuilder_INTERNAL"));
  const std::unique_ptr<IBuilder> builder(static_cast<IBuilder*>(create(&library.logger(), library.number())));
  if (builder == nullptr) {
    throw Error(Code::kBackend,
                problem("TensorRT builder", library.logger().takeErrors(), "one", "check the GPU's driver"));
  }
#if defined(SINKRT_TENSORRT_8)
  const uint32_t flags = 1U << static_cast<uint32_t>(NetworkDefinitionCreationFlag::kEXPLICIT_BATCH);
#elif NV_TENSORRT_MAJOR == 10
  const uint32_t flags = 1U << static_cast<uint32_t>(NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
#else
  const uint32_t flags = 0;  // every network is strongly typed
#endif
  const std::unique_ptr<INetworkDefinition> network(builder->createNetworkV2(flags));
  const std::unique_ptr<nvonnxparser::IParser> parser = parsers.parse(*network, library.logger(), graph);
  const std::unique_ptr<IBuilderConfig> config(builder->createBuilderConfig());
  if (options.workspace_bytes) config->setMemoryPoolLimit(MemoryPoolType::kWORKSPACE, *options.workspace_bytes);
  if (options.tactic_sources) config->setTacticSources(*options.tactic_sources);
  const std::unique_ptr<ITimingCache> cache = timingCache(*config, options.timing_cache);
#if defined(SINKRT_TENSORRT_8)
  sinkrt::holdPrecision(*network, *config, contentOf(graph));
  static_cast<void>(has_plugins);  // they write in place wherever they are given one buffer
#else
  if (has_plugins) config->setPreviewFeature(PreviewFeature::kALIASED_PLUGIN_IO_10_03, true);
#endif
  std::unique_ptr<IHostMemory> plan(builder->buildSerializedNetwork(*network, *config));
  if (plan == nullptr || plan->size() == 0) {
    const std::string errors = library.logger().takeErrors();
    const char* fix = "report it with the graph: exports should build";
#if defined(SINKRT_TENSORRT_8)
    if (errors.find("Could not find any implementation") != std::string::npos) {
      fix = "TensorRT 8 has no such kernel without cuBLAS 11: make that available, or use TensorRT 10";
    }
#endif
    throw Error(Code::kBackend, problem("engine of '" + graph + "'", errors,
                                        "a graph that TensorRT " + library.version() + " can build", fix));
  }
  if (cache != nullptr) {
    const std::unique_ptr<IHostMemory> kept(cache->serialize());
    if (kept != nullptr) writeWhole(options.timing_cache, kept->data(), kept->size());
  }
  return plan;
}

// What the manifest says of one engine.
sinkrt::EngineFacts factsOf(const sinkrt::Manifest& manifest, const std::string& role, const sinkrt::FileFacts& written,
                            const std::string& version) {
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    throw Error(Code::kBackend, problem("CUDA device", "none", "the GPU that the engine is for", "check nvidia-smi"));
  }
  sinkrt::EngineFacts facts;
  facts.file = std::string(sinkrt::kEngineFolder) + "/" + role + ".engine";
  facts.bytes = written.bytes;
  facts.sha256 = written.sha256;
  facts.graph_sha256 = manifest.files.at(manifest.graphs.at(role).file).sha256;
  facts.flavour = sinkrt::TensorrtLibrary::flavour();
  facts.version = version;
  facts.plugin_abi = manifest.plugin_abi;
  facts.precision = manifest.weights_dtype;
#if !defined(SINKRT_TENSORRT_RTX)  // whose engines suit all GPUs that it supports
  facts.gpu = device.name;
  facts.compute_capability = std::to_string(device.major) + "." + std::to_string(device.minor);
#endif
  return facts;
}

void run(const Options& options) {
  sinkrt::Manifest manifest = sinkrt::loadManifest(options.bundle);
  if (manifest.target != "tensorrt") {
    throw unusable("bundle", "one exported for " + manifest.target, "one exported with --target tensorrt");
  }
  sinkrt::checkFiles(options.bundle, manifest, false);
  sinkrt::TensorrtLibrary& library = sinkrt::TensorrtLibrary::get();
  if (options.verbose) library.logger().echo();
  const std::string folder = options.bundle + "/" + sinkrt::kEngineFolder,
                    plugin = options.bundle + "/" + sinkrt::kPluginFile;
  if (mkdir(folder.c_str(), 0755) != 0 && access(folder.c_str(), W_OK) != 0) {
    throw unusable("bundle", "'" + options.bundle + "', which cannot be written", "a writable folder");
  }
  if (manifest.plugin_abi) {
    if (*manifest.plugin_abi != sinkrt::kPluginAbi) {
      throw unusable("bundle", "'" + options.bundle + "' of plugin ABI " + *manifest.plugin_abi,
                     std::string("plugin ABI ") + sinkrt::kPluginAbi);
    }
    library.loadPlugin(options.plugin, plugin);
    if (!options.plugin.empty()) {  // beside the engines: that is where a session looks for it
      const std::string content = contentOf(options.plugin);
      writeWhole(plugin, content.data(), content.size());
    }
  }
  const Parser parser;
  std::map<std::string, sinkrt::EngineFacts> engines;
  for (const auto& [role, graph] : manifest.graphs) {
    const auto start = std::chrono::steady_clock::now();
    const std::string file = folder + "/" + role + ".engine";
    {
      const std::unique_ptr<IHostMemory> plan =
          build(library, parser, options.bundle + "/" + graph.file, options, manifest.plugin_abi.has_value());
      writeWhole(file, plan->data(), plan->size());
    }
    const sinkrt::FileFacts written = sinkrt::hashFile(file);
    engines[role] = factsOf(manifest, role, written, library.version());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %s, %s %s, %.1f MB, %.1f s\n", file.c_str(), role.c_str(), sinkrt::TensorrtLibrary::flavour(),
                library.version().c_str(), static_cast<double>(written.bytes) / 1e6, seconds.count());
    std::fflush(stdout);
  }
  const std::string path = options.bundle + "/" + sinkrt::kManifestName;
  manifest.schema_version = sinkrt::kSchemaVersion;
  manifest.engines = std::move(engines);
  const std::string text = manifest.toJson();
  sinkrt::Manifest::fromJson(text);  // what is written must be readable
  writeWhole(path, text.data(), text.size());
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parsed(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "sinkrt_build: error: %s\n", error.what());
    return 2;
  }
}
