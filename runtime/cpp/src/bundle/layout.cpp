#include "bundle/layout.h"

#include <optional>
#include <set>
#include <utility>

#include "bundle/checks.h"
#include "bundle/schema.h"

namespace sinkrt {
namespace {

using Shape = std::vector<int64_t>;

std::string listed(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// Where the states of one cache belong: all key heads of a layer, or those of one group (head_windows).
struct Cache {
  int64_t layer;
  std::string suffix;
  int64_t num_kv_heads;
  std::optional<int64_t> window_size;
};

class Checker {
 public:
  explicit Checker(const Manifest& manifest) : manifest_(manifest) {}

  void states() {
    std::map<int64_t, std::set<std::string>> kinds;  // by layer
    for (const StateSpec& state : manifest_.states) {
      const std::string what = "state '" + state.input + "'";
      if (!by_name_.emplace(state.input, &state).second) refuse(what, "the name twice", "a name of its own");
      if (state.layer >= manifest_.model.num_layers) {
        refuse("layer of " + what, std::to_string(state.layer),
               "below num_layers=" + std::to_string(manifest_.model.num_layers));
      }
      if (state.output != state.input + ".next") {
        refuse("output of " + what, "'" + state.output + "'", "'" + state.input + ".next'");
      }
      kinds[state.layer].insert(state.kind);
    }
    bool has_caches = false, has_sinks = false;
    for (const auto& [layer, found] : kinds) {
      const size_t recurrent = found.count(kConv) + found.count(kRecurrent);
      if (recurrent > 0) linearAttention(layer);
      if (found.size() == recurrent) continue;
      has_caches = true;
      has_sinks = has_sinks || found.count(kSinkK) > 0 || found.count(kSinkV) > 0;
      for (const Cache& one : caches(layer)) cache(one);
    }
    if (has_caches && !has_sinks && manifest_.stream.num_sink_tokens > 0) {
      refuse("stream.num_sink_tokens", std::to_string(manifest_.stream.num_sink_tokens), "0: no layer keeps sinks");
    }
    for (const auto& named : by_name_) {
      if (expected_.count(named.first)) continue;
      refuse("states", "'" + named.first + "'", "names of the form <kind>.<layer>, one for each state of a layer");
    }
  }

  // ids [B, T] and position [B, ..] in, logits float32 [B, vocab] out.
  void graph(const std::string& role, int64_t batch, int64_t num_tokens) const {
    const auto found = manifest_.graphs.find(role);
    if (found == manifest_.graphs.end()) return;
    const GraphSpec& graph = found->second;
    const std::string of = " of graph '" + role + "'";
    if (graph.num_tokens != num_tokens) {
      refuse("num_tokens" + of, std::to_string(graph.num_tokens), std::to_string(num_tokens) + ", as stream says");
    }
    Shape ids, position;
    for (const TensorSpec& spec : graph.inputs) {
      if (spec.name == "ids") ids = spec.shape;
      if (spec.name == "position") position = spec.shape;
    }
    if (ids != Shape{batch, num_tokens}) refuse("ids" + of, listed(ids), listed({batch, num_tokens}));
    if (position.empty() || position[0] != batch) refuse("position" + of, listed(position), listed({batch}));
    const Shape logits = {batch, manifest_.model.vocab_size};
    const bool fits = graph.outputs.size() == 1 && graph.outputs[0].name == "logits" &&
                      graph.outputs[0].shape == logits && graph.outputs[0].dtype == "float32";
    if (!fits) refuse("outputs" + of, "others", "logits float32 " + listed(logits) + " alone");
  }

 private:
  std::vector<Cache> caches(int64_t layer) const {
    std::vector<const HeadWindow*> groups;
    if (manifest_.head_windows) {
      for (const HeadWindow& group : *manifest_.head_windows) {
        if (group.layer == layer) groups.push_back(&group);
      }
    }
    const std::string name = std::to_string(layer);
    if (groups.empty()) return {{layer, name, manifest_.model.num_kv_heads, std::nullopt}};
    if (groups.size() == 1) return {{layer, name, manifest_.model.num_kv_heads, groups[0]->window_size}};
    std::vector<Cache> out;
    for (size_t i = 0; i < groups.size(); ++i) {
      out.push_back({layer, name + "." + std::to_string(i), static_cast<int64_t>(groups[i]->kv_heads.size()),
                     groups[i]->window_size});
    }
    return out;
  }

  // The states of one cache.
  void cache(const Cache& cache) {
    const StreamFacts& stream = manifest_.stream;
    const ModelFacts& model = manifest_.model;
    const int64_t batch = stream.batch, heads = cache.num_kv_heads;
    const StateSpec* window = find(std::string(kWindowK) + "." + cache.suffix);
    if (window == nullptr) {
      refuse("states of layer " + std::to_string(cache.layer),
             "no '" + std::string(kWindowK) + "." + cache.suffix + "'", "keys of the window in each cache");
    }
    const bool has_sinks = find(std::string(kSinkK) + "." + cache.suffix) != nullptr;
    const int64_t length = window->shape.size() == 4 ? window->shape[2] : 0;  // 0: its shape is refused below
    const int64_t longest = cache.window_size.value_or(stream.window_size);
    int64_t low = longest, high = longest;
    if (!has_sinks && !cache.window_size) {
      low = 1;  // a sliding window shorter than S + W, or S = 0
      if (stream.num_sink_tokens > 0) high = stream.capacity() - 1;
    }
    if (length > 0 && (length < low || length > high)) {
      refuse("tokens of state '" + window->input + "'", std::to_string(length),
             (low == high ? "" : std::to_string(low) + " .. ") + std::to_string(high) +
                 ", as stream and head_windows say");
    }
    const bool is_int8 = window->dtype == "int8";
    const std::string float_dtype = manifest_.plugin_abi ? "float16" : manifest_.weights_dtype;  // the plugin's, always
    const auto both = [&](const char* k, const char* v, const Shape& shape, const std::string& dtype) {
      for (const char* kind : {k, v}) state(kind, cache.suffix, shape, dtype);
    };
    both(kWindowK, kWindowV, {batch, heads, length, model.head_dim}, is_int8 ? "int8" : float_dtype);
    if (has_sinks) both(kSinkK, kSinkV, {batch, heads, stream.num_sink_tokens, model.head_dim}, float_dtype);
    if (is_int8) both(kWindowKScale, kWindowVScale, {batch, heads, length}, "float16");
    if (find(std::string(kAttentionMass) + "." + cache.suffix) != nullptr) {
      const int64_t q_heads = heads * (model.num_q_heads / model.num_kv_heads);
      state(kAttentionMass, cache.suffix, {batch, q_heads, 2, length}, "float32");
    }
  }

  void state(const std::string& kind, const std::string& suffix, const Shape& shape, const std::string& dtype) {
    const StateSpec& state = named(kind, suffix, "every state of a cache");
    if (state.shape != shape || state.dtype != dtype) {
      refuse("state '" + state.input + "'", state.dtype + " " + listed(state.shape), dtype + " " + listed(shape));
    }
  }

  // The states of linear attention: any shape, one row for each stream.
  void linearAttention(int64_t layer) {
    for (const char* kind : kRecurrentKinds) {
      const StateSpec& state = named(kind, std::to_string(layer), "both states of linear attention");
      if (state.shape.empty() || state.shape[0] != manifest_.stream.batch) {
        refuse("streams of state '" + state.input + "'", listed(state.shape),
               "batch=" + std::to_string(manifest_.stream.batch) + " first");
      }
    }
  }

  const StateSpec& named(const std::string& kind, const std::string& suffix, const std::string& wanted) {
    const std::string name = kind + "." + suffix;
    const StateSpec* state = find(name);
    if (state == nullptr) refuse("states", "no '" + name + "'", wanted);
    if (state->kind != kind) refuse("kind of state '" + name + "'", state->kind, kind);
    expected_.insert(name);
    return *state;
  }

  const StateSpec* find(const std::string& name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? nullptr : found->second;
  }

  const Manifest& manifest_;
  std::map<std::string, const StateSpec*> by_name_;
  std::set<std::string> expected_;
};

}  // namespace

void checkLayout(const Manifest& manifest) {
  Checker checker(manifest);
  checker.states();
  checker.graph("decode", manifest.stream.batch, 1);
  checker.graph("prefill", 1, manifest.stream.chunk_size);
}

}  // namespace sinkrt
