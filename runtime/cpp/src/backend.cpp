#include "sinkrt/backend.h"

#include <algorithm>
#include <set>

#include "sinkrt/constants.h"

namespace sinkrt {
namespace {

std::string shown(const std::vector<TensorSpec>& specs) {
  std::string out;
  for (const TensorSpec& spec : specs) {
    out += (out.empty() ? "" : ", ") + spec.name + " " + spec.dtype + " [";
    for (size_t i = 0; i < spec.shape.size(); ++i) out += (i ? ", " : "") + std::to_string(spec.shape[i]);
    out += "]";
  }
  return out.empty() ? "nothing" : out;
}

void compare(const std::string& what, std::vector<TensorSpec> found, const std::vector<TensorSpec>& wanted) {
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto equal = [](const TensorSpec& a, const TensorSpec& b) {
    return a.name == b.name && a.shape == b.shape && a.dtype == b.dtype;
  };
  if (std::equal(found.begin(), found.end(), wanted.begin(), wanted.end(), equal)) return;
  throw Error(Code::kBundle, problem(what, shown(found), shown(wanted), "export the model again"));
}

}  // namespace

Backend::Backend(const Manifest& manifest)
    : manifest_(manifest),
      is_recurrent_(manifest.isRecurrent()),
      sampler_(manifest.model.vocab_size),
      next_ids_(static_cast<size_t>(manifest.stream.batch)),
      active_(new bool[next_ids_.size()]()) {}

void Backend::steps(const StepsRequest& request) {
  const int64_t batch = manifest_.stream.batch, capacity = manifest_.stream.capacity();
  const int64_t vocab_size = manifest_.model.vocab_size;
  const int64_t* ends = request.end_ids + request.num_end_ids;
  std::fill(request.num_ids, request.num_ids + batch, 0);
  for (int64_t i = 0; i < request.count; ++i) {
    bool any = false;
    const float* rows = logits();
    for (int64_t b = 0; b < batch; ++b) {
      active_[b] = false;
      if (request.ended[b]) continue;
      const int64_t id = sampler_.sample(rows + b * vocab_size, request.recent_ids + b * capacity, capacity,
                                         request.positions[b], request.sampling[b]);
      if (std::find(request.end_ids, ends, id) != ends) {
        request.ended[b] = true;
        continue;
      }
      next_ids_[b] = id;
      active_[b] = any = true;
    }
    if (!any) return;
    step(next_ids_.data(), request.positions, active_.get());
    for (int64_t b = 0; b < batch; ++b) {
      if (!active_[b]) continue;
      request.ids[b * request.count + request.num_ids[b]++] = next_ids_[b];
      request.recent_ids[b * capacity + request.positions[b] % capacity] = next_ids_[b];
      ++request.positions[b];
    }
  }
}

bool hasTensorrtPlugin(const Manifest& manifest) {
  return manifest.plugin_abi && manifest.target != kCpuTarget;
}

void checkGraphs(const Manifest& manifest) {
  const StreamFacts& stream = manifest.stream;
  std::map<std::string, std::pair<int64_t, int64_t>> roles = {{"decode", {stream.batch, 1}}};
  if (stream.chunk_size > 1) roles["prefill"] = {1, stream.chunk_size};
  std::string found, wanted;
  for (const auto& graph : manifest.graphs) {
    if (graph.first == kVerifyRole) continue;  // Python's runtime alone verifies drafts yet
    found += (found.empty() ? "" : ", ") + graph.first;
  }
  for (const auto& role : roles) wanted += (wanted.empty() ? "" : ", ") + role.first;
  if (found != wanted) throw Error(Code::kBundle, problem("graphs", found, wanted, "export the model again"));
  const bool plugin = hasTensorrtPlugin(manifest);
  const char* integer = plugin ? "int32" : "int64";
  for (const auto& [role, size] : roles) {
    const auto [batch, num_tokens] = size;
    std::vector<TensorSpec> inputs = {{"ids", {batch, num_tokens}, integer}, {"position", {batch}, integer}};
    if (plugin) inputs[1].shape.push_back(2);
    if (role == "prefill") inputs.insert(inputs.begin() + 1, {"num_valid", {batch}, integer});
    const GraphSpec& graph = manifest.graphs.at(role);
    compare("inputs of the " + role + " graph", graph.inputs, inputs);
    compare("outputs of the " + role + " graph", graph.outputs,
            {{"logits", {batch, manifest.model.vocab_size}, "float32"}});
  }
  std::set<std::string> names;
  for (const StateSpec& state : manifest.states) {
    for (const std::string& name : {state.input, state.output}) {
      if (names.insert(name).second) continue;
      throw Error(Code::kBundle,
                  problem("states", "'" + name + "' twice", "names of their own", "export the model again"));
    }
    if (state.shape.empty() || state.shape[0] != stream.batch) {
      throw Error(Code::kBundle, problem("shape of '" + state.input + "'", shown({state.tensor()}),
                                         std::to_string(stream.batch) + " streams first", "export the model again"));
    }
  }
}

std::unique_ptr<Backend> loadBackend(const std::string& name, const std::string& bundle, const Manifest& manifest,
                                     const BackendOptions& options) {
  if (name != "ort" && name != "tensorrt") {
    throw Error(Code::kUsage, problem("backend", "'" + name + "'", "ort | tensorrt", "choose one of them"));
  }
  checkGraphs(manifest);
  if (name == "ort" && hasTensorrtPlugin(manifest)) {
    throw Error(Code::kBackend,
                problem("backend 'ort'", "a bundle whose graphs need the TensorRT plugin", "standard operators",
                        "use the backend tensorrt, or export with --target onnx"));
  }
#ifdef SINKRT_WITH_ORT
  if (name == "ort") return loadOrtBackend(bundle, manifest, options);
#endif
#ifdef SINKRT_WITH_TENSORRT
  if (name == "tensorrt") return loadTensorrtBackend(bundle, manifest, options);
#endif
  (void)bundle;
  (void)options;
  const char* option = name == "ort" ? "build with -DSINKRT_WITH_ORT=ON" : "build with -DSINKRT_WITH_TENSORRT=ON";
  throw Error(Code::kBackend,
              problem("backend", "'" + name + "', which this library was built without", "one that it has", option));
}

}  // namespace sinkrt
