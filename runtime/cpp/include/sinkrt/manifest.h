// The bundle's manifest, all that a runtime knows of a model. Twin of runtime/sinkrt/contract.py, which says what every
// field means.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sinkrt/error.h"
#include "sinkrt/ring.h"

namespace sinkrt {

constexpr int64_t kSchemaVersion = 5;
constexpr const char* kManifestName = "manifest.json";
constexpr const char* kPluginAbi = "3";

// Bytes of one element of a dtype (float32, float16, int64, int32, int8); 0: unknown.
int64_t dtypeBytes(const std::string& dtype);
// Bytes of a tensor; the largest int64 if there are more. Allocates nothing.
int64_t tensorBytes(const std::vector<int64_t>& shape, const std::string& dtype);

// A graph input or output, of static shape.
struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
  std::string dtype;

  int64_t bytes() const { return tensorBytes(shape, dtype); }
};

// One state tensor of one layer: `input` and `output` must be bound to the same buffer.
struct StateSpec {
  int64_t layer = 0;
  // sink_k | sink_v | window_k | window_v | window_k_scale | window_v_scale | attention_mass | conv | recurrent
  std::string kind;
  std::string input;
  std::string output;
  std::vector<int64_t> shape;  // [B, ...]
  std::string dtype;

  TensorSpec tensor() const { return {input, shape, dtype}; }
  int64_t bytes() const { return tensorBytes(shape, dtype); }
  int64_t rowBytes() const { return bytes() / shape[0]; }  // of one stream
  // Of linear attention: a step makes all of it anew, by standard operators.
  bool isRecurrent() const { return kind == "conv" || kind == "recurrent"; }
};

// Id of a stream that stands still while others step, where there are recurrent states: these know no positions.
constexpr int64_t kNoToken = -1;

// One graph. `inputs` and `outputs` leave the states out.
struct GraphSpec {
  std::string file;
  int64_t num_tokens = 0;  // T
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
};

struct ModelFacts {
  std::string name;
  std::string architecture;
  std::string family;
  int64_t num_layers = 0;
  int64_t num_q_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t hidden_size = 0;
  int64_t vocab_size = 0;
  int64_t num_parameters = 0;
  std::string position_scheme;
  std::optional<int64_t> bos_token_id;
  std::vector<int64_t> eos_token_ids;
};

// S, W, B, T, in tokens, and the first position that the graph's integer phase cannot take.
struct StreamFacts {
  int64_t num_sink_tokens = 0;
  int64_t window_size = 0;
  int64_t batch = 0;
  int64_t chunk_size = 0;
  int64_t position_limit = 0;

  int64_t capacity() const { return num_sink_tokens + window_size; }  // C
};

struct TokenizerFacts {
  std::string file;
  std::optional<std::string> chat_template;
};

struct FileFacts {
  int64_t bytes = 0;
  std::string sha256;  // 64 hex digits
};

struct Quantization {
  std::string recipe;
  std::string weights;
  std::string activations;
  std::string kv;
  std::optional<std::string> calibration_sha256;
  std::map<std::string, double> thresholds;
};

// Calibration of later sinks; heads [L][Hq].
struct ActTuning {
  double alpha = 0;
  double beta = 0;
  int64_t min_queries = 0;
  std::vector<std::vector<uint8_t>> heads;  // 0 or 1
};

// How attention to sinks was changed without training; it is in the graphs. Factors [L][Hq].
struct SinkTuning {
  std::string sha256;  // of the file that the export was given
  std::vector<std::vector<double>> first_token_scale;
  std::optional<ActTuning> act;
};

// How attention weights are scaled and shifted; it is in the graphs.
struct AffineAttention {
  std::string sha256;  // of the file that the export was given
  std::string file;    // its copy inside the bundle
  bool has_inputs = false;
  std::vector<std::vector<int64_t>> heads;  // [L], the query heads that are changed
};

// Key heads of a layer that keep the last window_size tokens beside the sinks.
struct HeadWindow {
  int64_t layer = 0;
  std::vector<int64_t> kv_heads;
  int64_t window_size = 0;
};

struct EngineFacts {
  std::string file;
  int64_t bytes = 0;
  std::string sha256;
  std::string graph_sha256;
  std::string flavour;  // TensorRT | TensorRT-RTX
  std::string version;
  std::optional<std::string> plugin_abi;
  std::optional<std::string> gpu;
  std::optional<std::string> compute_capability;
  std::string precision;
};

struct Manifest {
  int64_t schema_version = 0;
  std::string target;  // onnx | tensorrt
  std::string weights_dtype;
  ModelFacts model;
  StreamFacts stream;
  std::map<std::string, GraphSpec> graphs;  // by role: decode, and prefill if T > 1
  std::vector<StateSpec> states;
  std::optional<TokenizerFacts> tokenizer;
  std::map<std::string, FileFacts> files;
  std::map<std::string, std::string> producer;
  std::optional<Quantization> quantization;
  std::optional<std::string> plugin_abi;
  std::map<std::string, EngineFacts> engines;  // by role; empty: none were built
  std::optional<SinkTuning> sink_tuning;
  std::optional<std::vector<HeadWindow>> head_windows;  // none: all heads keep stream.window_size tokens
  std::optional<AffineAttention> affine_attention;

  // Whether there is linear attention.
  bool isRecurrent() const {
    return std::any_of(states.begin(), states.end(), [](const StateSpec& state) { return state.isRecurrent(); });
  }
  int64_t weightsBytes() const;
  int64_t stateBytes() const;
  // What a saved state depends on: the same digits as Python's `Manifest.fingerprint`.
  std::string fingerprint() const;

  // Parse and validate. Throws Error(kBundle) for malformed text, an unknown or missing key, or a newer schema.
  static Manifest fromJson(const std::string& text);
};

// Read bundle/manifest.json. Throws Error(kBundle).
Manifest loadManifest(const std::string& bundle);

// Size and SHA-256 of a file. Throws Error(kBundle) if it cannot be read.
FileFacts hashFile(const std::string& path);

// Compare every file of the bundle with the manifest: size always, SHA-256 if `hashes`. Throws Error(kBundle).
void checkFiles(const std::string& bundle, const Manifest& manifest, bool hashes = true);

}  // namespace sinkrt
