// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
// The bundle's manifest, all that a runtime knows of a model.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "sinkrt/constants.h"
#include "sinkrt/error.h"
#include "sinkrt/ring.h"

namespace sinkrt {

// Bytes of one element of a dtype (float32, float16, int64, int32, int8); 0: unknown.
int64_t dtypeBytes(const std::string& dtype);
// Bytes of a tensor; the largest int64 if there are more. Allocates nothing.
int64_t tensorBytes(const std::vector<int64_t>& shape, const std::string& dtype);

// A graph input or output.
struct TensorSpec {
  std::string name;            // its name in the graph
  std::vector<int64_t> shape;  // static, every axis >= 1
  std::string dtype;           // a key of `DTYPE_BYTES`

  int64_t bytes() const { return tensorBytes(shape, dtype); }
};

// One state tensor of one layer: `input` and `output` must be bound to the same buffer.
struct StateSpec {
  int64_t layer = 0;   // index of the layer
  std::string kind;    // what it holds: sink_k | sink_v | window_k | window_v | window_k_scale | window_v_scale |
                       // attention_mass | conv | recurrent
  std::string input;   // its name among the graph's inputs
  std::string output;  // its name among the graph's outputs
  std::vector<int64_t> shape;  // [B, ..]
  std::string dtype;           // a key of `DTYPE_BYTES`

  TensorSpec tensor() const { return {input, shape, dtype}; }
  int64_t bytes() const { return tensorBytes(shape, dtype); }
  int64_t rowBytes() const { return bytes() / shape[0]; }  // of one stream
  // Whether it belongs to a recurrence: a step makes all of it anew, by standard operators.
  bool isRecurrent() const;
};

// One ONNX graph. `inputs` and `outputs` leave the states out: `Manifest.states` lists those.
struct GraphSpec {
  std::string file;                     // path inside the bundle
  int64_t num_tokens = 0;               // T, tokens of each stream in one run
  std::vector<TensorSpec> inputs;       // inputs that are no states
  std::vector<TensorSpec> outputs;      // outputs that are no states
  std::optional<int64_t> weight_bytes;  // bytes of weights that one run reads; None: made before schema 6
};

// What the bundle was made from. Counts have no unit.
struct ModelFacts {
  std::string name;                     // name of the source
  std::string architecture;             // name of transformers' class
  std::string family;                   // transformers' model_type
  int64_t num_layers = 0;               // decoder layers
  int64_t num_q_heads = 0;              // query heads of a layer, a multiple of num_kv_heads; 0: none
  int64_t num_kv_heads = 0;             // key and value heads of a layer; 0: no attention
  int64_t head_dim = 0;                 // elements of a head; 0: no attention
  int64_t hidden_size = 0;              // elements of a hidden state
  int64_t vocab_size = 0;               // logits of a token
  int64_t num_parameters = 0;           // parameters of the model
  std::string position_scheme;          // how positions enter attention
  std::optional<int64_t> bos_token_id;  // token that begins a text; None: there is none
  std::vector<int64_t> eos_token_ids;   // tokens that end a text
};

// Sizes of one cache: what one attention call of a layer keeps.
struct AttentionCache {
  int64_t layer = 0;         // index of the layer
  int64_t call = 0;          // number of the call among those of its layer
  int64_t num_q_heads = 0;   // query heads, a multiple of num_kv_heads
  int64_t num_kv_heads = 0;  // key and value heads
  int64_t key_dim = 0;       // elements of a key
  int64_t value_dim = 0;     // elements of a value
  bool latent = false;       // whether values are a part of the keys' rows (MLA)

  // What its states have behind "<kind>.": the layer, and the call unless it is the first.
  std::string suffix() const { return std::to_string(layer) + (call == 0 ? "" : ".call" + std::to_string(call)); }
};

// Geometry of the cache, in tokens.
struct StreamFacts {
  int64_t num_sink_tokens = 0;  // S, first tokens of a stream, which stay
  int64_t window_size = 0;      // W, latest tokens, which are kept beside the sinks
  int64_t batch = 0;            // B, streams decoded together
  int64_t chunk_size = 0;       // T of the prefill graph; 1: there is none
  int64_t position_limit = 0;   // first stream position that the graph's integer phase cannot take

  int64_t capacity() const { return num_sink_tokens + window_size; }  // C
};

// Tokenizer files inside the bundle.
struct TokenizerFacts {
  std::string file;                          // path of tokenizer.json
  std::optional<std::string> chat_template;  // path of a Jinja file; None: there is none
};

// Size and SHA-256 of one file of the bundle.
struct FileFacts {
  int64_t bytes = 0;   // size
  std::string sha256;  // 64 hex digits
};

// How a bundle was made small. The recipe's file says all; this is what tools ask for.
struct Quantization {
  std::string recipe;                             // name of the recipe
  std::string weights;                            // what weights are stored as: float | int8 | int4
  std::string activations;                        // what matmuls take: float | dynamic | static
  std::string kv;                                 // the window's entries; sinks are never quantised: fp | int8
  std::optional<std::string> calibration_sha256;  // of the calibration file (hex); None: none was used
  std::map<std::string, double> thresholds;       // what the recipe promises, for `sinkexport verify`
};

// Scaling of later sinks, whose lost attention goes to the other tokens (ACT, arXiv:2406.15765).
struct ActTuning {
  double alpha = 0;                         // share of attention that makes a sink, >= 1
  double beta = 0;                          // what a sink's attention is multiplied by, 0 .. 1, 1 excluded
  int64_t min_queries = 0;                  // queries before a token is judged
  std::vector<std::vector<uint8_t>> heads;  // [L][Hq], where it is done
};

// How attention to sinks was changed, without training. It is in the graphs: a runtime does nothing about it.
struct SinkTuning {
  std::string sha256;                                  // of the file that the export was given
  std::vector<std::vector<double>> first_token_scale;  // [L][Hq] > 0, factors of token 0
  std::optional<ActTuning> act;                        // calibration of later sinks; None: none
};

// How attention weights are scaled and shifted (arXiv:2602.23057). It is in the graphs: a runtime does nothing.
struct AffineAttention {
  std::string sha256;                       // of the file that the export was given
  std::string file;                         // path of its copy inside the bundle
  bool has_inputs = false;                  // whether a scale or a bias depends on the hidden state
  std::vector<std::vector<int64_t>> heads;  // [L], the query heads that are changed
};

// Key heads of a layer that keep the last window_size tokens beside the sinks, with the query heads they serve.
struct HeadWindow {
  int64_t layer = 0;              // index of the layer
  std::vector<int64_t> kv_heads;  // indices of the key heads
  int64_t window_size = 0;        // tokens
};

// A TensorRT engine that was built of one graph: it runs nowhere but where it fits (`sinkrt.engines`).
struct EngineFacts {
  std::string file;                               // path inside the bundle
  int64_t bytes = 0;                              // size
  std::string sha256;                             // of the engine
  std::string graph_sha256;                       // of the ONNX file
  std::string flavour;                            // which TensorRT: TensorRT | TensorRT-RTX
  std::string version;                            // of TensorRT, in full
  std::optional<std::string> plugin_abi;          // of the plugin library; None: no plugin
  std::optional<std::string> gpu;                 // that it was built on; None: it suits all that the flavour supports
  std::optional<std::string> compute_capability;  // as 9.0; None: it suits all that the flavour supports
  std::string precision;                          // of the matmuls that are not quantised: float32 | float16
};

// Everything that a runtime knows about a bundle.
struct Manifest {
  int64_t schema_version = 0;  // version of this schema
  std::string target;          // what runs the graphs: onnx | cpu | tensorrt
  std::string weights_dtype;   // of arithmetic, and of weights not quantised: float32 | float16
  ModelFacts model;            // what the bundle was made from
  StreamFacts stream;          // geometry of the cache
  std::map<std::string, GraphSpec>
      graphs;                     // by role: decode always, prefill if T > 1, verify if drafts can be verified
  std::vector<StateSpec> states;  // states of all layers
  std::optional<TokenizerFacts> tokenizer;      // None: the bundle has none
  std::map<std::string, FileFacts> files;       // every file but this and the engines, by path (with '/')
  std::map<std::string, std::string> producer;  // versions of what made it, for bug reports
  std::optional<Quantization> quantization;     // None: floating point
  std::optional<std::string>
      plugin_abi;  // of the plugins or the CPU library that the graphs have nodes of; None: standard operators
  std::optional<std::map<std::string, EngineFacts>> engines;  // by the role of their graph; None: none were built
  std::optional<SinkTuning> sink_tuning;                      // None: attention is the model's own
  std::optional<std::vector<HeadWindow>> head_windows;        // None: all heads keep stream.window_size tokens
  std::optional<AffineAttention> affine_attention;            // None: attention weights are those of the softmax
  std::optional<std::vector<AttentionCache>>
      attention;  // None: each cache has the model's heads and head_dim; empty: no attention

  // Whether there are recurrent states: these know no positions, so an idle stream takes kNoToken.
  bool isRecurrent() const;
  int64_t weightsBytes() const;
  int64_t stateBytes() const;
  // What the metadata of each graph must say; "nothing" where they need not have it.
  std::string graphLayout() const;
  // What a saved state depends on: the same digits as Python's `Manifest.fingerprint`.
  std::string fingerprint() const;
  // The text of manifest.json, byte for byte as Python's `Manifest.to_json` writes it.
  std::string toJson() const;

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
