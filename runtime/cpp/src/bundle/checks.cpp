#include "bundle/checks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "bundle/layout.h"
#include "bundle/schema.h"

namespace sinkrt {
namespace {

std::string shapeText(const std::vector<int64_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() == 1 ? ",)" : ")");
}

// Whether a text has no control characters. (It is UTF-8: the JSON reader takes nothing else.)
bool isPlain(const std::string& text) {
  return std::none_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0x20 || c == 0x7f; });
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

// Query heads are a multiple of key heads; none is one of none.
void checkHeads(const std::string& where, int64_t num_q_heads, int64_t num_kv_heads) {
  const bool fits = num_kv_heads > 0 ? num_q_heads > 0 && num_q_heads % num_kv_heads == 0 : num_q_heads == 0;
  require(fits, where + ".num_q_heads", std::to_string(num_q_heads),
          num_kv_heads > 0 ? "a multiple of num_kv_heads=" + std::to_string(num_kv_heads) : "0, as num_kv_heads is");
}

// A table of the tuning: [L][Hq].
template <typename T>
void checkTable(const ModelFacts& model, const std::string& name, const std::vector<std::vector<T>>& rows) {
  const auto heads = static_cast<size_t>(model.num_q_heads);
  const bool fits = static_cast<int64_t>(rows.size()) == model.num_layers &&
                    std::all_of(rows.begin(), rows.end(), [&](const auto& layer) { return layer.size() == heads; });
  require(fits, "sink_tuning." + name, "other sizes",
          "(" + std::to_string(model.num_layers) + ", " + std::to_string(heads) + "): layers, query heads");
}

// Whether each cache is its layer's only one and has the model's sizes.
bool isUniform(const ModelFacts& model, const std::vector<AttentionCache>& caches) {
  std::set<int64_t> layers;
  return std::all_of(caches.begin(), caches.end(), [&](const AttentionCache& cache) {
    return layers.insert(cache.layer).second && cache.call == 0 && !cache.latent &&
           cache.num_q_heads == model.num_q_heads && cache.num_kv_heads == model.num_kv_heads &&
           cache.key_dim == model.head_dim && cache.value_dim == model.head_dim;
  });
}

void checkAttention(const Manifest& manifest) {
  const auto& caches = manifest.attention;
  const bool has_heads = manifest.model.num_q_heads > 0;
  require(has_heads != (caches && caches->empty()), "attention",
          caches ? std::to_string(caches->size()) + " caches" : "null",
          has_heads ? "null or a cache, as 'model' has heads" : "an empty list, as 'model' has no heads");
  if (!caches) return;
  require(manifest.schema_version >= kAttentionSchema, "attention",
          "it in schema " + std::to_string(manifest.schema_version),
          "null, or schema_version " + std::to_string(kAttentionSchema) + " and newer");
  require(!has_heads || !isUniform(manifest.model, *caches), "attention", "the sizes that 'model' has",
          "null for these");
  const std::pair<const char*, bool> variants[] = {{"sink_tuning", manifest.sink_tuning.has_value()},
                                                   {"head_windows", manifest.head_windows.has_value()},
                                                   {"affine_attention", manifest.affine_attention.has_value()}};
  for (const auto& [name, is_there] : variants) {
    require(!is_there, name, "it beside 'attention'", "null where caches differ in size");
  }
}

void checkSinkTuning(const Manifest& manifest) {
  const SinkTuning& tuning = *manifest.sink_tuning;
  checkTable(manifest.model, "first_token_scale", tuning.first_token_scale);
  if (tuning.act) checkTable(manifest.model, "act.heads", tuning.act->heads);
}

void checkAffineAttention(const Manifest& manifest) {
  const AffineAttention& facts = *manifest.affine_attention;
  require(manifest.files.count(facts.file) > 0, "affine_attention.file", facts.file, "a file that 'files' lists");
  bool fits = static_cast<int64_t>(facts.heads.size()) == manifest.model.num_layers;
  for (const auto& layer : facts.heads) {
    for (const int64_t head : layer) fits = fits && 0 <= head && head < manifest.model.num_q_heads;
  }
  require(
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
    if (state.kind == kWindowK) layers.insert(state.layer);
  }
  const int64_t heads = manifest.model.num_kv_heads;
  const bool is_plausible = static_cast<int64_t>(found.size()) == static_cast<int64_t>(layers.size()) * heads;
  for (const int64_t layer : layers) {
    for (int64_t head = 0; is_plausible && head < heads; ++head) wanted.emplace_back(layer, head);
  }
  std::sort(found.begin(), found.end());
  require(is_plausible && found == wanted, "head_windows", std::to_string(found.size()) + " key heads",
          "each key head of each layer with a window once");
  require(longest <= manifest.stream.window_size, "head_windows", std::to_string(longest),
          "<= window_size=" + std::to_string(manifest.stream.window_size));
}

}  // namespace

void refuse(const std::string& what, const std::string& received, const std::string& expected, const std::string& fix) {
  throw Error(Code::kBundle, problem(what, received, expected, fix));
}

void require(bool ok, const std::string& what, const std::string& received, const std::string& expected) {
  if (!ok) refuse(what, received, expected);
}

void atLeast(const char* what, int64_t value, int64_t least, const char* unit) {
  require(value >= least, what, std::to_string(value), ">= " + std::to_string(least) + unit);
}

void pathInside(const std::string& what, const std::string& path) {
  require(isInside(path), what, path, "a relative path inside the bundle");
}

void digest(const char* what, const std::string& text) {
  const bool hex =
      std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
  require(hex && text.size() == 64, what, text, "64 hex digits");
}

void check(const TensorSpec& spec) {
  require(!spec.name.empty(), "tensor name", "''", "a name");
  require(isPlain(spec.name), "tensor name", "'" + spec.name + "'", "text without control characters");
  require(static_cast<int64_t>(spec.shape.size()) <= kMaxRank, "shape of '" + spec.name + "'",
          std::to_string(spec.shape.size()) + " axes", "at most " + std::to_string(kMaxRank));
  const bool positive = std::all_of(spec.shape.begin(), spec.shape.end(), [](int64_t n) { return n >= 1; });
  require(positive, "shape of '" + spec.name + "'", shapeText(spec.shape), "every axis >= 1");
  std::string dtypes;
  for (const Dtype& dtype : kDtypes) dtypes += (dtypes.empty() ? "" : " | ") + std::string(dtype.name);
  require(dtypeBytes(spec.dtype) > 0, "dtype of '" + spec.name + "'", spec.dtype, dtypes);
  require(spec.bytes() <= kMaxTensorBytes, "shape of '" + spec.name + "'", shapeText(spec.shape), "at most 2^46 bytes");
}

void check(const StateSpec& state) {
  require(state.input != state.output, "state output name", state.output, "a name other than the input's");
  check(state.tensor());
}

void check(const ModelFacts& model) {
  checkHeads("model", model.num_q_heads, model.num_kv_heads);
  const bool has_attention = model.num_q_heads > 0;
  require((model.head_dim > 0) == has_attention, "model.head_dim", std::to_string(model.head_dim),
          has_attention ? ">= 1, as there are query heads" : "0, as there are no query heads");
}

void check(const AttentionCache& cache) {
  checkHeads("attention", cache.num_q_heads, cache.num_kv_heads);
  if (!cache.latent) return;
  require(cache.num_kv_heads == 1, "attention.num_kv_heads", std::to_string(cache.num_kv_heads), "1 in a latent cache");
  require(cache.value_dim <= cache.key_dim, "attention.value_dim", std::to_string(cache.value_dim),
          "at most key_dim=" + std::to_string(cache.key_dim) + " in a latent cache");
}

void check(const StreamFacts& stream) {
  require(stream.num_sink_tokens <= kPositionLimit && stream.window_size <= kPositionLimit, "stream.window_size",
          std::to_string(stream.window_size), "S and W of at most 2^47");
  require(stream.batch <= kPositionLimit / (stream.num_sink_tokens + stream.window_size), "stream.batch",
          std::to_string(stream.batch), "at most 2^47 tokens in all streams' caches");
  require(1 <= stream.position_limit && stream.position_limit <= kPositionLimit, "stream.position_limit",
          std::to_string(stream.position_limit), "1 .. 2^47");
  require(1 <= stream.chunk_size && stream.chunk_size <= stream.window_size, "stream.chunk_size",
          std::to_string(stream.chunk_size), "1 .. window_size=" + std::to_string(stream.window_size));
}

void check(const ActTuning& act) {
  require(act.alpha >= 1 && std::isfinite(act.alpha), "sink_tuning.act.alpha", std::to_string(act.alpha), ">= 1");
  require(act.beta >= 0 && act.beta < 1, "sink_tuning.act.beta", std::to_string(act.beta), ">= 0 and < 1");
}

void check(const SinkTuning& tuning) {
  double smallest = std::numeric_limits<double>::infinity();
  for (const auto& layer : tuning.first_token_scale) {
    for (const double factor : layer) smallest = std::min(smallest, factor);
  }
  require(smallest > 0 && std::isfinite(smallest), "sink_tuning.first_token_scale", std::to_string(smallest), "> 0");
}

void check(const HeadWindow& group) {
  require(!group.kv_heads.empty(), "head_windows kv_heads", "none", "at least one");
}

void check(const Manifest& manifest) {
  checkAttention(manifest);
  if (manifest.sink_tuning) checkSinkTuning(manifest);
  if (manifest.head_windows) checkHeadWindows(manifest);
  if (manifest.affine_attention) checkAffineAttention(manifest);
  if (manifest.engines) {
    for (const auto& engine : *manifest.engines) {
      require(manifest.graphs.count(engine.first) > 0, "engines", engine.first, "the role of a graph");
    }
  }
  require(manifest.graphs.count("decode") > 0, "graphs", std::to_string(manifest.graphs.size()) + " without it",
          "a graph named 'decode'");
  for (const auto& [role, graph] : manifest.graphs) {
    require(manifest.files.count(graph.file) > 0, "graph file", graph.file, "a file that 'files' lists");
  }
  for (const auto& file : manifest.files) {
    pathInside("file path", file.first);
  }
  if (manifest.tokenizer) {
    for (const std::string& path :
         {manifest.tokenizer->file, manifest.tokenizer->chat_template.value_or(manifest.tokenizer->file)}) {
      require(manifest.files.count(path) > 0, "tokenizer file", path, "a file that 'files' lists");
    }
  }
  checkLayout(manifest);
}

}  // namespace sinkrt
