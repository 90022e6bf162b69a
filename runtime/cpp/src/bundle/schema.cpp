// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
#include "bundle/schema.h"

#include "bundle/json_fields.h"

namespace sinkrt {

void read(const Json& raw, const std::string& where, TensorSpec& out) {
  Fields(raw, where).take("name", out.name).take("shape", out.shape).take("dtype", out.dtype).end();
  check(out);
}

Json toJson(const TensorSpec& value) {
  Json out = Json::object();
  out.add("name", toJson(value.name));
  out.add("shape", toJson(value.shape));
  out.add("dtype", toJson(value.dtype));
  return out;
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
  atLeast("state layer", out.layer, 0);
  oneOf("state kind", out.kind, kAllKinds);
  check(out);
}

Json toJson(const StateSpec& value) {
  Json out = Json::object();
  out.add("layer", toJson(value.layer));
  out.add("kind", toJson(value.kind));
  out.add("input", toJson(value.input));
  out.add("output", toJson(value.output));
  out.add("shape", toJson(value.shape));
  out.add("dtype", toJson(value.dtype));
  return out;
}

void read(const Json& raw, const std::string& where, GraphSpec& out) {
  Fields(raw, where)
      .take("file", out.file)
      .take("num_tokens", out.num_tokens)
      .take("inputs", out.inputs)
      .take("outputs", out.outputs)
      .takeIfThere("weight_bytes", out.weight_bytes)
      .end();
  atLeast("graph num_tokens", out.num_tokens, 1);
  atLeast("graph weight_bytes", out.weight_bytes, 0);
}

Json toJson(const GraphSpec& value) {
  Json out = Json::object();
  out.add("file", toJson(value.file));
  out.add("num_tokens", toJson(value.num_tokens));
  out.add("inputs", toJson(value.inputs));
  out.add("outputs", toJson(value.outputs));
  out.add("weight_bytes", toJson(value.weight_bytes));
  return out;
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
  atLeast("model.num_layers", out.num_layers, 1);
  atLeast("model.num_q_heads", out.num_q_heads, 0);
  atLeast("model.num_kv_heads", out.num_kv_heads, 0);
  atLeast("model.head_dim", out.head_dim, 0);
  atLeast("model.hidden_size", out.hidden_size, 1);
  atLeast("model.vocab_size", out.vocab_size, 1);
  check(out);
}

Json toJson(const ModelFacts& value) {
  Json out = Json::object();
  out.add("name", toJson(value.name));
  out.add("architecture", toJson(value.architecture));
  out.add("family", toJson(value.family));
  out.add("num_layers", toJson(value.num_layers));
  out.add("num_q_heads", toJson(value.num_q_heads));
  out.add("num_kv_heads", toJson(value.num_kv_heads));
  out.add("head_dim", toJson(value.head_dim));
  out.add("hidden_size", toJson(value.hidden_size));
  out.add("vocab_size", toJson(value.vocab_size));
  out.add("num_parameters", toJson(value.num_parameters));
  out.add("position_scheme", toJson(value.position_scheme));
  out.add("bos_token_id", toJson(value.bos_token_id));
  out.add("eos_token_ids", toJson(value.eos_token_ids));
  return out;
}

void read(const Json& raw, const std::string& where, AttentionCache& out) {
  Fields(raw, where)
      .take("layer", out.layer)
      .take("call", out.call)
      .take("num_q_heads", out.num_q_heads)
      .take("num_kv_heads", out.num_kv_heads)
      .take("key_dim", out.key_dim)
      .take("value_dim", out.value_dim)
      .take("latent", out.latent)
      .end();
  atLeast("attention.layer", out.layer, 0);
  atLeast("attention.call", out.call, 0);
  atLeast("attention.num_q_heads", out.num_q_heads, 1);
  atLeast("attention.num_kv_heads", out.num_kv_heads, 1);
  atLeast("attention.key_dim", out.key_dim, 1);
  atLeast("attention.value_dim", out.value_dim, 1);
  check(out);
}

Json toJson(const AttentionCache& value) {
  Json out = Json::object();
  out.add("layer", toJson(value.layer));
  out.add("call", toJson(value.call));
  out.add("num_q_heads", toJson(value.num_q_heads));
  out.add("num_kv_heads", toJson(value.num_kv_heads));
  out.add("key_dim", toJson(value.key_dim));
  out.add("value_dim", toJson(value.value_dim));
  out.add("latent", toJson(value.latent));
  return out;
}

void read(const Json& raw, const std::string& where, StreamFacts& out) {
  Fields(raw, where)
      .take("num_sink_tokens", out.num_sink_tokens)
      .take("window_size", out.window_size)
      .take("batch", out.batch)
      .take("chunk_size", out.chunk_size)
      .take("position_limit", out.position_limit)
      .end();
  atLeast("stream.num_sink_tokens", out.num_sink_tokens, 0);
  atLeast("stream.window_size", out.window_size, 1);
  atLeast("stream.batch", out.batch, 1);
  check(out);
}

Json toJson(const StreamFacts& value) {
  Json out = Json::object();
  out.add("num_sink_tokens", toJson(value.num_sink_tokens));
  out.add("window_size", toJson(value.window_size));
  out.add("batch", toJson(value.batch));
  out.add("chunk_size", toJson(value.chunk_size));
  out.add("position_limit", toJson(value.position_limit));
  return out;
}

void read(const Json& raw, const std::string& where, TokenizerFacts& out) {
  Fields(raw, where).take("file", out.file).take("chat_template", out.chat_template).end();
  pathInside("tokenizer file", out.file);
  pathInside("tokenizer file", out.chat_template);
}

Json toJson(const TokenizerFacts& value) {
  Json out = Json::object();
  out.add("file", toJson(value.file));
  out.add("chat_template", toJson(value.chat_template));
  return out;
}

void read(const Json& raw, const std::string& where, FileFacts& out) {
  Fields(raw, where).take("bytes", out.bytes).take("sha256", out.sha256).end();
  atLeast("file size", out.bytes, 0, " bytes");
  digest("file sha256", out.sha256);
}

Json toJson(const FileFacts& value) {
  Json out = Json::object();
  out.add("bytes", toJson(value.bytes));
  out.add("sha256", toJson(value.sha256));
  return out;
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
  oneOf("quantization.weights", out.weights, kWeightKinds);
  oneOf("quantization.activations", out.activations, kActivationKinds);
  oneOf("quantization.kv", out.kv, kWindowKinds);
}

Json toJson(const Quantization& value) {
  Json out = Json::object();
  out.add("recipe", toJson(value.recipe));
  out.add("weights", toJson(value.weights));
  out.add("activations", toJson(value.activations));
  out.add("kv", toJson(value.kv));
  out.add("calibration_sha256", toJson(value.calibration_sha256));
  out.add("thresholds", toJson(value.thresholds));
  return out;
}

void read(const Json& raw, const std::string& where, ActTuning& out) {
  Fields(raw, where)
      .take("alpha", out.alpha)
      .take("beta", out.beta)
      .take("min_queries", out.min_queries)
      .take("heads", out.heads)
      .end();
  atLeast("sink_tuning.act.min_queries", out.min_queries, 1);
  check(out);
}

Json toJson(const ActTuning& value) {
  Json out = Json::object();
  out.add("alpha", toJson(value.alpha));
  out.add("beta", toJson(value.beta));
  out.add("min_queries", toJson(value.min_queries));
  out.add("heads", toJson(value.heads));
  return out;
}

void read(const Json& raw, const std::string& where, SinkTuning& out) {
  Fields(raw, where)
      .take("sha256", out.sha256)
      .take("first_token_scale", out.first_token_scale)
      .takeIfThere("act", out.act)
      .end();
  digest("file sha256", out.sha256);
  check(out);
}

Json toJson(const SinkTuning& value) {
  Json out = Json::object();
  out.add("sha256", toJson(value.sha256));
  out.add("first_token_scale", toJson(value.first_token_scale));
  out.add("act", toJson(value.act));
  return out;
}

void read(const Json& raw, const std::string& where, AffineAttention& out) {
  Fields(raw, where)
      .take("sha256", out.sha256)
      .take("file", out.file)
      .take("has_inputs", out.has_inputs)
      .take("heads", out.heads)
      .end();
  digest("file sha256", out.sha256);
}

Json toJson(const AffineAttention& value) {
  Json out = Json::object();
  out.add("sha256", toJson(value.sha256));
  out.add("file", toJson(value.file));
  out.add("has_inputs", toJson(value.has_inputs));
  out.add("heads", toJson(value.heads));
  return out;
}

void read(const Json& raw, const std::string& where, HeadWindow& out) {
  Fields(raw, where).take("layer", out.layer).take("kv_heads", out.kv_heads).take("window_size", out.window_size).end();
  atLeast("head_windows layer", out.layer, 0);
  atLeast("head_windows window_size", out.window_size, 1);
  check(out);
}

Json toJson(const HeadWindow& value) {
  Json out = Json::object();
  out.add("layer", toJson(value.layer));
  out.add("kv_heads", toJson(value.kv_heads));
  out.add("window_size", toJson(value.window_size));
  return out;
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
  pathInside("engine file", out.file);
  atLeast("file size", out.bytes, 0, " bytes");
  digest("file sha256", out.sha256);
  digest("file sha256", out.graph_sha256);
  oneOf("engine flavour", out.flavour, kFlavours);
  oneOf("engine precision", out.precision, kFloatDtypes);
}

Json toJson(const EngineFacts& value) {
  Json out = Json::object();
  out.add("file", toJson(value.file));
  out.add("bytes", toJson(value.bytes));
  out.add("sha256", toJson(value.sha256));
  out.add("graph_sha256", toJson(value.graph_sha256));
  out.add("flavour", toJson(value.flavour));
  out.add("version", toJson(value.version));
  out.add("plugin_abi", toJson(value.plugin_abi));
  out.add("gpu", toJson(value.gpu));
  out.add("compute_capability", toJson(value.compute_capability));
  out.add("precision", toJson(value.precision));
  return out;
}

void read(const Json& raw, const std::string& where, Manifest& out) {
  Fields(raw, where)
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
      .takeIfThere("engines", out.engines)
      .takeIfThere("sink_tuning", out.sink_tuning)
      .takeIfThere("head_windows", out.head_windows)
      .takeIfThere("affine_attention", out.affine_attention)
      .takeIfThere("attention", out.attention)
      .end();
  oneOf("target", out.target, kTargets);
  oneOf("weights_dtype", out.weights_dtype, kFloatDtypes);
  check(out);
}

Json toJson(const Manifest& value) {
  Json out = Json::object();
  out.add("schema_version", toJson(value.schema_version));
  out.add("target", toJson(value.target));
  out.add("weights_dtype", toJson(value.weights_dtype));
  out.add("model", toJson(value.model));
  out.add("stream", toJson(value.stream));
  out.add("graphs", toJson(value.graphs));
  out.add("states", toJson(value.states));
  out.add("tokenizer", toJson(value.tokenizer));
  out.add("files", toJson(value.files));
  out.add("producer", toJson(value.producer));
  out.add("quantization", toJson(value.quantization));
  out.add("plugin_abi", toJson(value.plugin_abi));
  out.add("engines", toJson(value.engines));
  out.add("sink_tuning", toJson(value.sink_tuning));
  out.add("head_windows", toJson(value.head_windows));
  out.add("affine_attention", toJson(value.affine_attention));
  out.add("attention", toJson(value.attention));
  return out;
}

}  // namespace sinkrt
