#include "sinkrt/manifest.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <set>
#include <string_view>
#include <utility>

#include "bundle/json.h"
#include "bundle/layout.h"
#include "bundle/sha256.h"
#include "files.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

[[noreturn]] void refuse(const std::string& what, const std::string& received, const std::string& expected,
                         const std::string& fix = "export the model again") {
  throw Error(Code::kBundle, problem(what, received, expected, fix));
}

void check(bool ok, const std::string& what, const std::string& received, const std::string& expected) {
  if (!ok) refuse(what, received, expected);
}

void atLeast(int64_t least, const std::string& what, int64_t value) {
  check(value >= least, what, std::to_string(value), ">= " + std::to_string(least));
}

void oneOf(const std::string& what, const std::string& value, std::initializer_list<const char*> values) {
  std::string all;
  for (const char* allowed : values) {
    if (value == allowed) return;
    all += (all.empty() ? "" : " | ") + std::string(allowed);
  }
  refuse(what, value, all);
}

// What was found instead, as Python tells it.
std::string shown(const Json& value) {
  switch (value.type) {
    case Json::Type::kNull:
      return "NoneType None";
    case Json::Type::kBool:
      return value.boolean ? "bool True" : "bool False";
    case Json::Type::kInt:
      return "int " + std::to_string(value.integer);
    case Json::Type::kFloat:
      return "float " + std::to_string(value.number);
    case Json::Type::kString:
      return ("str '" + value.text + "'").substr(0, 60);
    case Json::Type::kArray:
      return "list";
    case Json::Type::kObject:
      return "dict";
  }
  return "nothing";
}

// Each overload reads one type of the schema, strictly; `where` names the value for messages.
void read(const Json& raw, const std::string& where, std::string& out) {
  check(raw.isString(), where, shown(raw), "str");
  out = raw.text;
}

void read(const Json& raw, const std::string& where, int64_t& out) {
  check(raw.type == Json::Type::kInt, where, shown(raw), "int");
  out = raw.integer;
}

void read(const Json& raw, const std::string& where, double& out) {
  check(raw.type == Json::Type::kInt || raw.type == Json::Type::kFloat, where, shown(raw), "float");
  out = raw.type == Json::Type::kInt ? static_cast<double>(raw.integer) : raw.number;
}

void read(const Json& raw, const std::string& where, bool& out) {
  check(raw.type == Json::Type::kBool, where, shown(raw), "bool");
  out = raw.boolean;
}

// A truth value: `std::vector<bool>` has no elements to read into.
void read(const Json& raw, const std::string& where, uint8_t& out) {
  check(raw.type == Json::Type::kBool, where, shown(raw), "bool");
  out = raw.boolean ? 1 : 0;
}

void read(const Json& raw, const std::string& where, TensorSpec& out);
void read(const Json& raw, const std::string& where, StateSpec& out);
void read(const Json& raw, const std::string& where, GraphSpec& out);
void read(const Json& raw, const std::string& where, ModelFacts& out);
void read(const Json& raw, const std::string& where, StreamFacts& out);
void read(const Json& raw, const std::string& where, TokenizerFacts& out);
void read(const Json& raw, const std::string& where, FileFacts& out);
void read(const Json& raw, const std::string& where, Quantization& out);
void read(const Json& raw, const std::string& where, EngineFacts& out);
void read(const Json& raw, const std::string& where, ActTuning& out);
void read(const Json& raw, const std::string& where, SinkTuning& out);
void read(const Json& raw, const std::string& where, HeadWindow& out);
void read(const Json& raw, const std::string& where, AffineAttention& out);

template <typename T>
void read(const Json& raw, const std::string& where, std::vector<T>& out);
template <typename T>
void read(const Json& raw, const std::string& where, std::map<std::string, T>& out);

template <typename T>
void read(const Json& raw, const std::string& where, std::optional<T>& out) {
  out.reset();
  if (raw.isNull()) return;
  T value{};
  read(raw, where, value);
  out = std::move(value);
}

template <typename T>
void read(const Json& raw, const std::string& where, std::vector<T>& out) {
  check(raw.isArray(), where, shown(raw), "a list");
  out.clear();
  for (const Json& item : raw.items) {
    const std::string name = where + "[" + std::to_string(out.size()) + "]";  // before the element is there
    read(item, name, out.emplace_back());
  }
}

template <typename T>
void read(const Json& raw, const std::string& where, std::map<std::string, T>& out) {
  check(raw.isObject(), where, shown(raw), "an object");
  out.clear();
  for (const auto& [key, value] : raw.members) read(value, where + "." + key, out[key]);
}

// The fields of an object: none unknown, none missing.
class Fields {
 public:
  Fields(const Json& raw, const std::string& where) : raw_(raw), where_(where) {
    if (!raw.isObject()) refuse(where, shown(raw), "an object", "export again");
  }

  template <typename T>
  Fields& take(const char* name, T& out) {
    return take(name, out, true);
  }
  // One that older schemas do not have.
  template <typename T>
  Fields& takeIfThere(const char* name, T& out) {
    return take(name, out, false);
  }

  // After all fields: the first unknown or missing key is refused before any wrong value is.
  void end() {
    std::set<std::string> unknown;
    for (const auto& member : raw_.members) {
      if (!names_.count(member.first)) unknown.insert(member.first);
    }
    if (!unknown.empty()) {
      std::string all;
      for (const std::string& name : names_) all += (all.empty() ? "" : ", ") + name;
      refuse(where_, "unknown key '" + *unknown.begin() + "'", all, "remove it or export again");
    }
    if (!missing_.empty()) refuse(where_, "no key '" + *missing_.begin() + "'", "every key", "export again");
    if (problem_) throw *problem_;
  }

 private:
  template <typename T>
  Fields& take(const char* name, T& out, bool required) {
    names_.insert(name);
    const Json* value = raw_.find(name);
    if (value == nullptr) {
      if (required) missing_.insert(name);
      return *this;
    }
    try {
      read(*value, where_ + "." + name, out);
    } catch (const Error& error) {
      if (!problem_) problem_ = error;
    }
    return *this;
  }

  const Json& raw_;
  const std::string& where_;
  std::set<std::string> names_, missing_;
  std::optional<Error> problem_;
};

std::string shapeText(const std::vector<int64_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

// Whether a text has no control characters. (It is UTF-8: the JSON reader takes nothing else.)
bool isPlain(const std::string& text) {
  return std::none_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0x20 || c == 0x7f; });
}

void checkTensor(const TensorSpec& spec) {
  check(!spec.name.empty(), "tensor name", "''", "a name");
  check(isPlain(spec.name), "tensor name", "'" + spec.name + "'", "text without control characters");
  check(spec.shape.size() <= kMaxRank, "shape of '" + spec.name + "'", std::to_string(spec.shape.size()) + " axes",
        "at most " + std::to_string(kMaxRank));
  const bool positive = std::all_of(spec.shape.begin(), spec.shape.end(), [](int64_t n) { return n >= 1; });
  check(positive, "shape of '" + spec.name + "'", shapeText(spec.shape), "every axis >= 1");
  check(dtypeBytes(spec.dtype) > 0, "dtype of '" + spec.name + "'", spec.dtype,
        "float32 | float16 | int64 | int32 | int8");
  check(spec.bytes() <= kMaxTensorBytes, "shape of '" + spec.name + "'", shapeText(spec.shape), "at most 2^46 bytes");
}

bool isInside(const std::string& path) {
  if (!isPlain(path) || path.find('\\') != std::string::npos) return false;
  for (size_t start = 0; start <= path.size();) {
    const size_t end = std::min(path.find('/', start), path.size());
    const std::string_view part = std::string_view(path).substr(start, end - start);
    if (part.empty() || part == "..") return false;
    start = end + 1;
  }
  return true;
}

void checkDigest(const std::string& digest) {
  const bool hex = std::all_of(digest.begin(), digest.end(),
                               [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
  check(hex && digest.size() == 64, "file sha256", digest, "64 hex digits");
}

void read(const Json& raw, const std::string& where, TensorSpec& out) {
  Fields(raw, where).take("name", out.name).take("shape", out.shape).take("dtype", out.dtype).end();
  checkTensor(out);
}

void read(const Json& raw, const std::string& where, StateSpec& out) {
  Fields(raw, where)
      .take("layer", out.layer)
      .take("kind", out.kind)
      .take("input", out.input)
      .take("output", out.output)
      .take("shape", out.shape)
      .take("dtype", out.dtype)
      .end();
  atLeast(0, "state layer", out.layer);
  oneOf("state kind", out.kind,
        {"sink_k", "sink_v", "window_k", "window_v", "window_k_scale", "window_v_scale", "attention_mass", "conv",
         "recurrent"});
  check(out.input != out.output, "state output name", out.output, "a name other than the input's");
  checkTensor(out.tensor());
}

void read(const Json& raw, const std::string& where, GraphSpec& out) {
  Fields(raw, where)
      .take("file", out.file)
      .take("num_tokens", out.num_tokens)
      .take("inputs", out.inputs)
      .take("outputs", out.outputs)
      .end();
  atLeast(1, "graph num_tokens", out.num_tokens);
}

void read(const Json& raw, const std::string& where, ModelFacts& out) {
  Fields(raw, where)
      .take("name", out.name)
      .take("architecture", out.architecture)
      .take("family", out.family)
      .take("num_layers", out.num_layers)
      .take("num_q_heads", out.num_q_heads)
      .take("num_kv_heads", out.num_kv_heads)
      .take("head_dim", out.head_dim)
      .take("hidden_size", out.hidden_size)
      .take("vocab_size", out.vocab_size)
      .take("num_parameters", out.num_parameters)
      .take("position_scheme", out.position_scheme)
      .take("bos_token_id", out.bos_token_id)
      .take("eos_token_ids", out.eos_token_ids)
      .end();
  atLeast(1, "model.num_layers", out.num_layers);
  atLeast(1, "model.num_q_heads", out.num_q_heads);
  atLeast(1, "model.num_kv_heads", out.num_kv_heads);
  atLeast(1, "model.head_dim", out.head_dim);
  atLeast(1, "model.hidden_size", out.hidden_size);
  atLeast(1, "model.vocab_size", out.vocab_size);
  check(out.num_q_heads % out.num_kv_heads == 0, "model.num_q_heads", std::to_string(out.num_q_heads),
        "a multiple of num_kv_heads=" + std::to_string(out.num_kv_heads));
}

void read(const Json& raw, const std::string& where, StreamFacts& out) {
  Fields(raw, where)
      .take("num_sink_tokens", out.num_sink_tokens)
      .take("window_size", out.window_size)
      .take("batch", out.batch)
      .take("chunk_size", out.chunk_size)
      .take("position_limit", out.position_limit)
      .end();
  atLeast(0, "stream.num_sink_tokens", out.num_sink_tokens);
  atLeast(1, "stream.window_size", out.window_size);
  atLeast(1, "stream.batch", out.batch);
  check(out.num_sink_tokens <= kPositionLimit && out.window_size <= kPositionLimit, "stream.window_size",
        std::to_string(out.window_size), "S and W of at most 2^47");
  check(out.batch <= kPositionLimit / (out.num_sink_tokens + out.window_size), "stream.batch",
        std::to_string(out.batch), "at most 2^47 tokens in all streams' caches");
  check(1 <= out.position_limit && out.position_limit <= kPositionLimit, "stream.position_limit",
        std::to_string(out.position_limit), "1 .. 2^47");
  check(1 <= out.chunk_size && out.chunk_size <= out.window_size, "stream.chunk_size", std::to_string(out.chunk_size),
        "1 .. window_size=" + std::to_string(out.window_size));
}

void read(const Json& raw, const std::string& where, TokenizerFacts& out) {
  Fields(raw, where).take("file", out.file).take("chat_template", out.chat_template).end();
  for (const std::string& path : {out.file, out.chat_template.value_or(out.file)}) {
    check(isInside(path), "tokenizer file", path, "a relative path inside the bundle");
  }
}

void read(const Json& raw, const std::string& where, FileFacts& out) {
  Fields(raw, where).take("bytes", out.bytes).take("sha256", out.sha256).end();
  check(out.bytes >= 0, "file size", std::to_string(out.bytes), ">= 0 bytes");
  checkDigest(out.sha256);
}

void read(const Json& raw, const std::string& where, Quantization& out) {
  Fields(raw, where)
      .take("recipe", out.recipe)
      .take("weights", out.weights)
      .take("activations", out.activations)
      .take("kv", out.kv)
      .take("calibration_sha256", out.calibration_sha256)
      .take("thresholds", out.thresholds)
      .end();
  oneOf("quantization.weights", out.weights, {"float", "int8", "int4"});
  oneOf("quantization.activations", out.activations, {"float", "dynamic", "static"});
  oneOf("quantization.kv", out.kv, {"fp", "int8"});
}

void read(const Json& raw, const std::string& where, EngineFacts& out) {
  Fields(raw, where)
      .take("file", out.file)
      .take("bytes", out.bytes)
      .take("sha256", out.sha256)
      .take("graph_sha256", out.graph_sha256)
      .take("flavour", out.flavour)
      .take("version", out.version)
      .take("plugin_abi", out.plugin_abi)
      .take("gpu", out.gpu)
      .take("compute_capability", out.compute_capability)
      .take("precision", out.precision)
      .end();
  check(isInside(out.file), "engine file", out.file, "a relative path inside the bundle");
  check(out.bytes >= 0, "file size", std::to_string(out.bytes), ">= 0 bytes");
  checkDigest(out.sha256);
  checkDigest(out.graph_sha256);
  oneOf("engine flavour", out.flavour, {"TensorRT", "TensorRT-RTX"});
  oneOf("engine precision", out.precision, {"float32", "float16"});
}

void read(const Json& raw, const std::string& where, ActTuning& out) {
  Fields(raw, where)
      .take("alpha", out.alpha)
      .take("beta", out.beta)
      .take("min_queries", out.min_queries)
      .take("heads", out.heads)
      .end();
  check(out.alpha >= 1 && std::isfinite(out.alpha), "sink_tuning.act.alpha", std::to_string(out.alpha), ">= 1");
  check(out.beta >= 0 && out.beta < 1, "sink_tuning.act.beta", std::to_string(out.beta), ">= 0 and < 1");
  atLeast(1, "sink_tuning.act.min_queries", out.min_queries);
}

void read(const Json& raw, const std::string& where, SinkTuning& out) {
  Fields(raw, where)
      .take("sha256", out.sha256)
      .take("first_token_scale", out.first_token_scale)
      .takeIfThere("act", out.act)
      .end();
  checkDigest(out.sha256);
  double smallest = std::numeric_limits<double>::infinity();
  for (const auto& layer : out.first_token_scale) {
    for (const double factor : layer) smallest = std::min(smallest, factor);
  }
  check(smallest > 0 && std::isfinite(smallest), "sink_tuning.first_token_scale", std::to_string(smallest), "> 0");
}

void read(const Json& raw, const std::string& where, HeadWindow& out) {
  Fields(raw, where).take("layer", out.layer).take("kv_heads", out.kv_heads).take("window_size", out.window_size).end();
  atLeast(0, "head_windows layer", out.layer);
  atLeast(1, "head_windows window_size", out.window_size);
  check(!out.kv_heads.empty(), "head_windows kv_heads", "none", "at least one");
}

void read(const Json& raw, const std::string& where, AffineAttention& out) {
  Fields(raw, where)
      .take("sha256", out.sha256)
      .take("file", out.file)
      .take("has_inputs", out.has_inputs)
      .take("heads", out.heads)
      .end();
  checkDigest(out.sha256);
}

// A table of the tuning: [L][Hq].
template <typename T>
void checkTable(const ModelFacts& model, const std::string& name, const std::vector<std::vector<T>>& rows) {
  const auto heads = static_cast<size_t>(model.num_q_heads);
  const bool fits = static_cast<int64_t>(rows.size()) == model.num_layers &&
                    std::all_of(rows.begin(), rows.end(), [&](const auto& layer) { return layer.size() == heads; });
  check(fits, "sink_tuning." + name, "other sizes",
        "(" + std::to_string(model.num_layers) + ", " + std::to_string(heads) + "): layers, query heads");
}

void checkSinkTuning(const Manifest& manifest) {
  const SinkTuning& tuning = *manifest.sink_tuning;
  checkTable(manifest.model, "first_token_scale", tuning.first_token_scale);
  if (tuning.act) checkTable(manifest.model, "act.heads", tuning.act->heads);
}

void checkAffineAttention(const Manifest& manifest) {
  const AffineAttention& facts = *manifest.affine_attention;
  check(manifest.files.count(facts.file) > 0, "affine_attention.file", facts.file, "a file that 'files' lists");
  bool fits = static_cast<int64_t>(facts.heads.size()) == manifest.model.num_layers;
  for (const auto& layer : facts.heads) {
    for (const int64_t head : layer) fits = fits && 0 <= head && head < manifest.model.num_q_heads;
  }
  check(
      fits, "affine_attention.heads", "other layers or heads",
      std::to_string(manifest.model.num_layers) + " layers, heads below " + std::to_string(manifest.model.num_q_heads));
}

void checkHeadWindows(const Manifest& manifest) {
  std::vector<std::pair<int64_t, int64_t>> found, wanted;  // layer, key head
  std::set<int64_t> layers;
  int64_t longest = 0;
  for (const HeadWindow& group : *manifest.head_windows) {
    for (const int64_t head : group.kv_heads) found.emplace_back(group.layer, head);
    longest = std::max(longest, group.window_size);
  }
  for (const StateSpec& state : manifest.states) {
    if (state.kind == "window_k") layers.insert(state.layer);
  }
  const int64_t heads = manifest.model.num_kv_heads;
  const bool is_plausible = static_cast<int64_t>(found.size()) == static_cast<int64_t>(layers.size()) * heads;
  for (const int64_t layer : layers) {
    for (int64_t head = 0; is_plausible && head < heads; ++head) wanted.emplace_back(layer, head);
  }
  std::sort(found.begin(), found.end());
  check(is_plausible && found == wanted, "head_windows", std::to_string(found.size()) + " key heads",
        "each key head of each layer with a window once");
  check(longest <= manifest.stream.window_size, "head_windows", std::to_string(longest),
        "<= window_size=" + std::to_string(manifest.stream.window_size));
}

}  // namespace

int64_t dtypeBytes(const std::string& dtype) {
  if (dtype == "float32" || dtype == "int32") return 4;
  if (dtype == "float16") return 2;
  if (dtype == "int64") return 8;
  return dtype == "int8" ? 1 : 0;
}

int64_t tensorBytes(const std::vector<int64_t>& shape, const std::string& dtype) {
  int64_t total = dtypeBytes(dtype);
  for (const int64_t n : shape) {
    if (__builtin_mul_overflow(total, n, &total)) return kMost;
  }
  return total;
}

int64_t Manifest::weightsBytes() const {
  int64_t total = 0;
  for (const auto& [path, facts] : files) {
    if (path.rfind("weights", 0) == 0 && __builtin_add_overflow(total, facts.bytes, &total)) return kMost;
  }
  return total;
}

int64_t Manifest::stateBytes() const {
  int64_t total = 0;
  for (const StateSpec& state : states) {
    if (__builtin_add_overflow(total, state.bytes(), &total)) return kMost;
  }
  return total;
}

std::string Manifest::fingerprint() const {
  // json.dumps(.., sort_keys=True) of what contract.py hashes, byte for byte.
  const auto number = [](int64_t n) { return std::to_string(n); };
  std::string ends;
  for (const int64_t id : model.eos_token_ids) ends += (ends.empty() ? "" : ", ") + number(id);
  std::string weights;
  for (const auto& [path, facts] : files) {
    if (path.rfind("weights", 0) != 0) continue;
    weights += (weights.empty() ? "" : ", ") + jsonQuoted(path) + ": " + jsonQuoted(facts.sha256);
  }
  std::string tuning, windows, affine;
  if (sink_tuning) tuning = ", " + jsonQuoted(sink_tuning->sha256);
  if (head_windows) {
    for (const HeadWindow& group : *head_windows) {
      std::string heads;
      for (const int64_t head : group.kv_heads) heads += (heads.empty() ? "" : ", ") + number(head);
      windows += std::string(windows.empty() ? "" : ", ") + "{\"kv_heads\": [" + heads +
                 "], \"layer\": " + number(group.layer) + ", \"window_size\": " + number(group.window_size) + "}";
    }
    windows = ", [" + windows + "]";
  }
  if (affine_attention) affine = ", " + jsonQuoted(affine_attention->sha256);
  const std::string text =
      "[{\"architecture\": " + jsonQuoted(model.architecture) +
      ", \"bos_token_id\": " + (model.bos_token_id ? number(*model.bos_token_id) : "null") + ", \"eos_token_ids\": [" +
      ends + "], \"family\": " + jsonQuoted(model.family) + ", \"head_dim\": " + number(model.head_dim) +
      ", \"hidden_size\": " + number(model.hidden_size) + ", \"name\": " + jsonQuoted(model.name) +
      ", \"num_kv_heads\": " + number(model.num_kv_heads) + ", \"num_layers\": " + number(model.num_layers) +
      ", \"num_parameters\": " + number(model.num_parameters) + ", \"num_q_heads\": " + number(model.num_q_heads) +
      ", \"position_scheme\": " + jsonQuoted(model.position_scheme) + ", \"vocab_size\": " + number(model.vocab_size) +
      "}, {\"batch\": " + number(stream.batch) + ", \"num_sink_tokens\": " + number(stream.num_sink_tokens) +
      ", \"position_limit\": " + number(stream.position_limit) + ", \"window_size\": " + number(stream.window_size) +
      "}, " + jsonQuoted(weights_dtype) + ", {" + weights + "}" + tuning + windows + affine + "]";
  Sha256 digest;
  digest.add(text.data(), text.size());
  return digest.hex();
}

Manifest Manifest::fromJson(const std::string& text) {
  Json raw;
  try {
    raw = parseJson(text);
  } catch (const JsonError& error) {
    refuse(kManifestName, std::string("invalid JSON (") + error.what() + ")", "a manifest", "export again");
  }
  const Json* version = raw.find("schema_version");
  if (version == nullptr || version->type != Json::Type::kInt) {
    refuse("schema_version", version == nullptr ? "None" : shown(*version), "an integer");
  }
  if (version->integer < 1) refuse("schema_version", std::to_string(version->integer), "at least 1");
  if (version->integer > kSchemaVersion) {
    refuse("schema_version", std::to_string(version->integer), "at most " + std::to_string(kSchemaVersion),
           "this bundle was made by a newer sinkexport: upgrade this runtime");
  }
  Manifest out;
  std::optional<std::map<std::string, EngineFacts>> engines;
  Fields(raw, "manifest")
      .take("schema_version", out.schema_version)
      .take("target", out.target)
      .take("weights_dtype", out.weights_dtype)
      .take("model", out.model)
      .take("stream", out.stream)
      .take("graphs", out.graphs)
      .take("states", out.states)
      .take("tokenizer", out.tokenizer)
      .take("files", out.files)
      .take("producer", out.producer)
      .takeIfThere("quantization", out.quantization)
      .takeIfThere("plugin_abi", out.plugin_abi)
      .takeIfThere("engines", engines)
      .takeIfThere("sink_tuning", out.sink_tuning)
      .takeIfThere("head_windows", out.head_windows)
      .takeIfThere("affine_attention", out.affine_attention)
      .end();
  if (engines) out.engines = *std::move(engines);
  if (out.sink_tuning) checkSinkTuning(out);
  if (out.head_windows) checkHeadWindows(out);
  if (out.affine_attention) checkAffineAttention(out);
  for (const auto& engine : out.engines) {
    check(out.graphs.count(engine.first) > 0, "engines", engine.first, "the role of a graph");
  }
  oneOf("target", out.target, {"onnx", "tensorrt"});
  oneOf("weights_dtype", out.weights_dtype, {"float32", "float16"});
  check(out.graphs.count("decode") > 0, "graphs", std::to_string(out.graphs.size()) + " without it",
        "a graph named 'decode'");
  for (const auto& [role, graph] : out.graphs) {
    check(out.files.count(graph.file) > 0, "graph file", graph.file, "a file that 'files' lists");
  }
  for (const auto& file : out.files) {
    check(isInside(file.first), "file path", file.first, "a relative path inside the bundle");
  }
  if (out.tokenizer) {
    for (const std::string& path : {out.tokenizer->file, out.tokenizer->chat_template.value_or(out.tokenizer->file)}) {
      check(out.files.count(path) > 0, "tokenizer file", path, "a file that 'files' lists");
    }
  }
  checkLayout(out);
  return out;
}

Manifest loadManifest(const std::string& bundle) {
  const std::string path = joined(bundle, kManifestName);
  std::string text;
  bool readable = readFile(path, text);
  if (!readable && fileSize(path) < 0) text = "a bundle needs one";
  if (readable && !isUtf8(text)) {
    readable = false;
    text = "not UTF-8";
  }
  if (!readable) {
    refuse(kManifestName, "no readable file at '" + path + "' (" + text + ")",
           "a folder that 'sinkexport export' wrote", "check the path or export the model");
  }
  return Manifest::fromJson(text);
}

FileFacts hashFile(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file) refuse("'" + path + "'", std::strerror(errno), "a readable file", "check its permissions");
  Sha256 digest;
  int64_t size = 0;
  std::vector<char> piece(size_t{1} << 20);
  while (const size_t count = std::fread(piece.data(), 1, piece.size(), file.get())) {
    digest.add(piece.data(), count);
    size += static_cast<int64_t>(count);
  }
  if (std::ferror(file.get())) {
    refuse("'" + path + "'", "an error while it was read", "a readable file", "copy it again");
  }
  return {size, digest.hex()};
}

void checkFiles(const std::string& bundle, const Manifest& manifest, bool hashes) {
  for (const auto& [name, facts] : manifest.files) {
    const std::string path = joined(bundle, name);
    const int64_t size = fileSize(path);
    if (size < 0) refuse(name, "no such file", "every file of the bundle", "copy the whole folder");
    if (size != facts.bytes) {
      refuse(name, std::to_string(size) + " bytes", std::to_string(facts.bytes) + " bytes", "copy or export it again");
    }
    if (!hashes) continue;
    const std::string found = hashFile(path).sha256;
    if (found != facts.sha256) {
      refuse(name, "sha256 " + found.substr(0, 12) + "..", facts.sha256.substr(0, 12) + "..",
             "the file is corrupt: copy or export it again");
    }
  }
}

}  // namespace sinkrt
