// sinkrt_build: engines of a bundle's graphs, and what its manifest says of them; what 'sinkexport build' does, where
// there is no Python or none of TensorRT's.
//
//   sinkrt_build BUNDLE [--plugin FILE] [--workspace MIB] [--tactic-sources BITS] [--timing-cache FILE] [--verbose]
//
// --tactic-sources: nvinfer1::TacticSource bits; 0 builds without cuBLAS and cuDNN (TensorRT 8). --timing-cache: what
// was measured is kept there, and not measured again. --verbose: all that TensorRT says, on stderr, with the time.
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
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "backends/tensorrt/library.h"
#include "bundle/engines.h"
#include "files.h"
#include "sinkrt/manifest.h"

using namespace nvinfer1;
using sinkrt::Code;
using sinkrt::Error;
using sinkrt::problem;

namespace {

constexpr const char* kFolder = "engines";

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

#if defined(SINKRT_TENSORRT_8)
// The few fields of ONNX's protobuf that tell types (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). A message
// as its fields in order; numbers keep their value, anything else its bytes.
struct Field {
  uint64_t number;  // of the field
  uint64_t value;
  std::string_view bytes;
};

uint64_t varint(std::string_view& data) {
  uint64_t value = 0;
  for (int shift = 0; !data.empty() && shift < 64; shift += 7) {
    const auto byte = static_cast<unsigned char>(data.front());
    data.remove_prefix(1);
    value |= uint64_t{byte & 0x7fu} << shift;
    if (byte < 0x80) return value;
  }
  throw Error(Code::kBundle, problem("graph", "a truncated file", "an ONNX graph", "copy or export the bundle again"));
}

std::vector<Field> fieldsOf(std::string_view data) {
  std::vector<Field> fields;
  while (!data.empty()) {
    const uint64_t key = varint(data), wire = key & 7;
    Field field{key >> 3, 0, {}};
    if (wire == 0) {
      field.value = varint(data);
    } else {
      const uint64_t size = wire == 2 ? varint(data) : wire == 1 ? 8 : 4;
      if (size > data.size()) throw Error(Code::kBundle, "graph: truncated");
      field.bytes = data.substr(0, size);
      data.remove_prefix(size);
    }
    fields.push_back(field);
  }
  return fields;
}

// Names of the values that the graph computes in float32: sinkexport.tensorrt.builder.float32_values.
std::set<std::string> float32Values(const std::string& graph_file) {
  constexpr uint64_t kGraph = 7, kNode = 1, kOutput = 12, kValueInfo = 13, kNodeOutput = 2, kName = 1, kType = 2;
  constexpr uint64_t kTensorType = 1, kElementType = 1, kFloat = 1;
  const std::string text = contentOf(graph_file);
  std::set<std::string> computed, found;
  std::vector<std::string_view> values;
  for (const Field& model : fieldsOf(text)) {
    if (model.number != kGraph) continue;
    for (const Field& part : fieldsOf(model.bytes)) {
      if (part.number == kOutput || part.number == kValueInfo) values.push_back(part.bytes);
      if (part.number != kNode) continue;
      for (const Field& field : fieldsOf(part.bytes)) {
        if (field.number == kNodeOutput) computed.emplace(field.bytes);
      }
    }
  }
  for (const std::string_view value : values) {
    std::string name;
    bool is_float = false;
    for (const Field& field : fieldsOf(value)) {
      if (field.number == kName) name = field.bytes;
      if (field.number != kType) continue;
      for (const Field& type : fieldsOf(field.bytes)) {
        if (type.number != kTensorType) continue;
        for (const Field& tensor : fieldsOf(type.bytes)) {
          is_float = is_float || (tensor.number == kElementType && tensor.value == kFloat);
        }
      }
    }
    if (is_float && computed.count(name) != 0) found.insert(name);
  }
  return found;
}

// Networks of TensorRT 8 are weakly typed: float16 is allowed, but not where the graph says float32. Its norms do:
// squares of massive activations overflow float16. INT8 states only pass through the plugin, but TensorRT wants some
// range for them.
void holdPrecision(INetworkDefinition& network, IBuilderConfig& config, const std::set<std::string>& float32) {
  config.setFlag(BuilderFlag::kFP16);
  config.setFlag(BuilderFlag::kOBEY_PRECISION_CONSTRAINTS);
  for (int32_t i = 0; i < network.getNbLayers(); ++i) {
    ILayer* layer = network.getLayer(i);
    if (layer->getNbOutputs() != 1 || float32.count(layer->getOutput(0)->getName()) == 0) continue;
    layer->setPrecision(DataType::kFLOAT);
    layer->setOutputType(0, DataType::kFLOAT);
  }
  const int32_t inputs = network.getNbInputs();
  for (int32_t i = 0; i < inputs + network.getNbOutputs(); ++i) {
    ITensor* tensor = i < inputs ? network.getInput(i) : network.getOutput(i - inputs);
    if (tensor->getType() != DataType::kINT8) continue;
    config.setFlag(BuilderFlag::kINT8);
    tensor->setDynamicRange(-127.0f, 127.0f);
  }
}
#endif

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

// What was measured before, if `path` names a file. TensorRT tells of one that does not fit, and begins anew.
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
  holdPrecision(*network, *config, float32Values(graph));
  static_cast<void>(has_plugins);  // they write in place wherever they are given one buffer
#else
  if (has_plugins) config->setPreviewFeature(PreviewFeature::kALIASED_PLUGIN_IO_10_03, true);
#endif
  std::unique_ptr<IHostMemory> plan(builder->buildSerializedNetwork(*network, *config));
  if (plan == nullptr || plan->size() == 0) {
    throw Error(Code::kBackend, problem("engine of '" + graph + "'", library.logger().takeErrors(),
                                        "a graph that TensorRT " + library.version() + " can build",
                                        "report it with the graph: exports should build"));
  }
  if (cache != nullptr) {
    const std::unique_ptr<IHostMemory> kept(cache->serialize());
    if (kept != nullptr) writeWhole(options.timing_cache, kept->data(), kept->size());
  }
  return plan;
}

std::string quoted(const std::string& text) {
  return '"' + text + '"';
}  // plain ASCII: versions, names of GPUs

// EngineFacts of one engine as the manifest has them, keys in order.
std::string entry(const sinkrt::Manifest& manifest, const std::string& role, const sinkrt::FileFacts& written,
                  const std::string& version) {
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    throw Error(Code::kBackend, problem("CUDA device", "none", "the GPU that the engine is for", "check nvidia-smi"));
  }
#if defined(SINKRT_TENSORRT_RTX)
  const std::string gpu = "null", capability = "null";  // it suits all that RTX supports
#else
  const std::string gpu = quoted(device.name);
  const std::string capability = quoted(std::to_string(device.major) + "." + std::to_string(device.minor));
#endif
  std::ostringstream out;
  out << "  " << quoted(role) << ": {\n   \"bytes\": " << written.bytes
      << ",\n   \"compute_capability\": " << capability
      << ",\n   \"file\": " << quoted(std::string(kFolder) + "/" + role + ".engine")
      << ",\n   \"flavour\": " << quoted(sinkrt::TensorrtLibrary::flavour()) << ",\n   \"gpu\": " << gpu
      << ",\n   \"graph_sha256\": " << quoted(manifest.files.at(manifest.graphs.at(role).file).sha256)
      << ",\n   \"plugin_abi\": " << (manifest.plugin_abi ? quoted(*manifest.plugin_abi) : "null")
      << ",\n   \"precision\": " << quoted(manifest.weights_dtype) << ",\n   \"sha256\": " << quoted(written.sha256)
      << ",\n   \"version\": " << quoted(version) << "\n  }";
  return out.str();
}

// The manifest's text with other engines. It is written by Manifest.to_json: a key of the top level on a line of its
// own, behind one space.
std::string withEngines(const std::string& text, const std::string& engines) {
  const std::string key = "\n \"engines\": ";
  const size_t at = text.find(key);
  if (at == std::string::npos) {
    throw Error(Code::kBundle, problem("manifest.json", "no 'engines'", "one that this version wrote", "export again"));
  }
  const size_t begin = at + key.size(), end = text.find(",\n \"", begin);
  return text.substr(0, begin) + engines + text.substr(end);
}

void run(const Options& options) {
  const sinkrt::Manifest manifest = sinkrt::loadManifest(options.bundle);
  if (manifest.target != "tensorrt") {
    throw unusable("bundle", "one exported for " + manifest.target, "one exported with --target tensorrt");
  }
  sinkrt::checkFiles(options.bundle, manifest, false);
  sinkrt::TensorrtLibrary& library = sinkrt::TensorrtLibrary::get();
  if (options.verbose) library.logger().echo();
  const std::string folder = options.bundle + "/" + kFolder, plugin = options.bundle + "/" + sinkrt::kPluginFile;
  if (mkdir(folder.c_str(), 0755) != 0 && access(folder.c_str(), W_OK) != 0) {
    throw unusable("bundle", "'" + options.bundle + "', which cannot be written", "a writable folder");
  }
  if (manifest.plugin_abi) {
    library.loadPlugin(options.plugin, plugin);
    if (!options.plugin.empty()) {  // beside the engines: that is where a session looks for it
      const std::string content = contentOf(options.plugin);
      writeWhole(plugin, content.data(), content.size());
    }
  }
  const Parser parser;
  std::string entries;
  for (const auto& [role, graph] : manifest.graphs) {
    const auto start = std::chrono::steady_clock::now();
    const std::string file = folder + "/" + role + ".engine";
    {
      const std::unique_ptr<IHostMemory> plan =
          build(library, parser, options.bundle + "/" + graph.file, options, manifest.plugin_abi.has_value());
      writeWhole(file, plan->data(), plan->size());
    }
    const sinkrt::FileFacts written = sinkrt::hashFile(file);
    entries += (entries.empty() ? "" : ",\n") + entry(manifest, role, written, library.version());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %s, %s %s, %.1f MB, %.1f s\n", file.c_str(), role.c_str(), sinkrt::TensorrtLibrary::flavour(),
                library.version().c_str(), static_cast<double>(written.bytes) / 1e6, seconds.count());
    std::fflush(stdout);
  }
  const std::string path = options.bundle + "/" + sinkrt::kManifestName;
  const std::string text = withEngines(contentOf(path), "{\n" + entries + "\n }");
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
