#include "bundle/layout.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>
#include <utility>

#include "bundle/checks.h"
#include "bundle/json_fields.h"
#include "bundle/schema.h"

namespace sinkrt {
namespace {

using Shape = std::vector<int64_t>;

std::string listed(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// Where the states of one cache belong: all key heads of a call, or those of one group (head_windows).
struct Cache {
  std::string suffix;
  const AttentionCache& sizes;
  int64_t num_kv_heads;
  std::optional<int64_t> window_size;
};

class Checker {
 public:
  explicit Checker(const Manifest& manifest) : manifest_(manifest) {}

  void states() {
    std::map<std::pair<int64_t, std::string>, int64_t> recurrent;  // number of states by layer and kind
    std::set<std::string> kinds;
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
      kinds.insert(state.kind);
      if (state.isRecurrent()) ++recurrent[{state.layer, state.kind}];
    }
    if (manifest_.attention) order(*manifest_.attention);
    for (const auto& [where, number] : recurrent) recurrentStates(where.first, where.second, number);
    for (const AttentionCache& sizes : manifest_.attention ? *manifest_.attention : modelCaches()) {
      for (const Cache& one : groups(sizes)) cache(one);
    }
    const auto has = [&](const char* kind) { return kinds.count(kind) > 0; };
    const bool has_caches = std::any_of(std::begin(kStateKinds), std::end(kStateKinds), has);
    if (has_caches && !has(kSinkK) && !has(kSinkV) && manifest_.stream.num_sink_tokens > 0) {
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
  // The caches if each is the one of its layer and has the model's heads, in the order of the states.
  std::vector<AttentionCache> modelCaches() const {
    const ModelFacts& model = manifest_.model;
    std::vector<AttentionCache> out;
    std::set<int64_t> layers;
    for (const StateSpec& state : manifest_.states) {
      if (state.isRecurrent() || !layers.insert(state.layer).second) continue;
      out.push_back(
          {state.layer, 0, model.num_q_heads, model.num_kv_heads, model.head_dim, model.head_dim, /*latent=*/false});
    }
    return out;
  }

  // Compare the caches of `attention` with those that have states, one by one; calls of a layer must ascend.
  void order(const std::vector<AttentionCache>& caches) const {
    std::vector<std::string> found;
    for (const StateSpec& state : manifest_.states) {
      if (state.kind == kWindowK) found.push_back(state.input);
    }
    std::map<int64_t, int64_t> last_calls;  // by layer
    for (size_t i = 0; i < std::max(caches.size(), found.size()); ++i) {
      const std::string what = "attention[" + std::to_string(i) + "]";
      const std::string name = i < found.size() ? "'" + found[i] + "', as states say" : "no more caches";
      if (i >= caches.size()) refuse(what, "no more", name);
      const AttentionCache& cache = caches[i];
      const std::string wanted = std::string(kWindowK) + "." + cache.suffix();
      if (i >= found.size() || found[i] != wanted) refuse(what, "'" + wanted + "'", name);
      const auto [last, is_first] = last_calls.emplace(cache.layer, cache.call);
      if (!is_first && cache.call <= last->second) {
        refuse(what + ".call", std::to_string(cache.call),
               "above " + std::to_string(last->second) + ", the layer's last");
      }
      last->second = cache.call;
    }
  }

  // The caches of one call: one, or one for each group of its key heads.
  std::vector<Cache> groups(const AttentionCache& sizes) const {
    std::vector<const HeadWindow*> groups;
    if (manifest_.head_windows) {
      for (const HeadWindow& group : *manifest_.head_windows) {
        if (group.layer == sizes.layer) groups.push_back(&group);
      }
    }
    const std::string name = sizes.suffix();
    if (groups.empty()) return {{name, sizes, sizes.num_kv_heads, std::nullopt}};
    if (groups.size() == 1) return {{name, sizes, sizes.num_kv_heads, groups[0]->window_size}};
    std::vector<Cache> out;
    for (size_t i = 0; i < groups.size(); ++i) {
      out.push_back({name + "." + std::to_string(i), sizes, static_cast<int64_t>(groups[i]->kv_heads.size()),
                     groups[i]->window_size});
    }
    return out;
  }

  // The states of one cache.
  void cache(const Cache& cache) {
    const StreamFacts& stream = manifest_.stream;
    const AttentionCache& sizes = cache.sizes;
    const int64_t batch = stream.batch, heads = cache.num_kv_heads;
    const StateSpec* window = find(std::string(kWindowK) + "." + cache.suffix);
    if (window == nullptr) {
      refuse("states of layer " + std::to_string(sizes.layer),
             "no '" + std::string(kWindowK) + "." + cache.suffix + "'", "keys of the window in each cache");
    }
    const bool has_sinks = find(std::string(kSinkK) + "." + cache.suffix) != nullptr;
    const int64_t length = window->shape.size() == 4 ? window->shape[2] : 0;  // 0: its shape is refused below
    checkLength(cache, *window, length, has_sinks);
    const bool is_int8 = window->dtype == "int8";
    const std::string float_dtype = manifest_.plugin_abi && manifest_.target != kCpuTarget
                                        ? "float16"
                                        : manifest_.weights_dtype;  // the plugin's, always
    const struct {
      const char* window;
      const char* sinks;
      const char* scales;
      int64_t dim;  // 0: there are no such states
    } parts[] = {{kWindowK, kSinkK, kWindowKScale, sizes.key_dim},
                 {kWindowV, kSinkV, kWindowVScale, sizes.latent ? 0 : sizes.value_dim}};
    for (const auto& part : parts) {
      if (is_int8) state(part.scales, cache, {batch, heads, length}, "float16");
      if (part.dim == 0) continue;
      state(part.window, cache, {batch, heads, length, part.dim}, is_int8 ? "int8" : float_dtype);
      if (has_sinks) state(part.sinks, cache, {batch, heads, stream.num_sink_tokens, part.dim}, float_dtype);
    }
    if (!manifest_.attention && find(std::string(kAttentionMass) + "." + cache.suffix) != nullptr) {
      const int64_t q_heads = heads * (sizes.num_q_heads / sizes.num_kv_heads);
      state(kAttentionMass, cache, {batch, q_heads, 2, length}, "float32");
    }
  }

  // Tokens of a window. length: 0 if its shape has none.
  void checkLength(const Cache& cache, const StateSpec& window, int64_t length, bool has_sinks) const {
    const StreamFacts& stream = manifest_.stream;
    const int64_t longest = cache.window_size.value_or(stream.window_size);
    int64_t low = longest, high = longest;
    if (!has_sinks && !cache.window_size) {
      low = 1;  // a sliding window shorter than S + W, or S = 0
      if (stream.num_sink_tokens > 0) high = stream.capacity() - 1;
    }
    if (length > 0 && (length < low || length > high)) {
      refuse("tokens of state '" + window.input + "'", std::to_string(length),
             (low == high ? "" : std::to_string(low) + " .. ") + std::to_string(high) +
                 ", as stream and head_windows say");
    }
  }

  void state(const std::string& kind, const Cache& cache, const Shape& shape, const std::string& dtype) {
    const StateSpec& state = named(kind, cache.suffix, cache.sizes.layer);
    if (state.shape != shape || state.dtype != dtype) {
      refuse("state '" + state.input + "'", state.dtype + " " + listed(state.shape), dtype + " " + listed(shape));
    }
  }

  // The recurrent states of a layer and kind: of any shape, one row for each stream, numbered without gaps.
  void recurrentStates(int64_t layer, const std::string& kind, int64_t number) {
    for (int64_t i = 0; i < number; ++i) {
      const StateSpec& state = named(kind, std::to_string(layer) + (i ? "." + std::to_string(i) : ""), layer);
      if (state.shape.empty() || state.shape[0] != manifest_.stream.batch) {
        refuse("streams of state '" + state.input + "'", listed(state.shape),
               "batch=" + std::to_string(manifest_.stream.batch) + " first");
      }
    }
  }

  // The state of this name, whose kind and layer must be those that the name says.
  const StateSpec& named(const std::string& kind, const std::string& suffix, int64_t layer) {
    const std::string name = kind + "." + suffix;
    const StateSpec* state = find(name);
    if (state == nullptr) {
      refuse("states", "no '" + name + "'", "every state of a cache, and recurrent states numbered from 0");
    }
    if (state->kind != kind || state->layer != layer) {
      refuse("state '" + name + "'", state->kind + " of layer " + std::to_string(state->layer),
             kind + " of layer " + std::to_string(layer));
    }
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

std::string Manifest::graphLayout() const {
  if (!attention) return "nothing";
  Json facts = Json::object();
  facts.add("num_layers", sinkrt::toJson(model.num_layers));
  facts.add("num_q_heads", sinkrt::toJson(model.num_q_heads));
  facts.add("num_kv_heads", sinkrt::toJson(model.num_kv_heads));
  facts.add("head_dim", sinkrt::toJson(model.head_dim));
  facts.add("num_sink_tokens", sinkrt::toJson(stream.num_sink_tokens));
  facts.add("window_size", sinkrt::toJson(stream.window_size));
  facts.add("attention", sinkrt::toJson(*attention));
  return dumpJson(facts, {-1, true});
}

void checkLayout(const Manifest& manifest) {
  Checker checker(manifest);
  checker.states();
  checker.graph("decode", manifest.stream.batch, 1);
  checker.graph("prefill", 1, manifest.stream.chunk_size);
}

}  // namespace sinkrt
