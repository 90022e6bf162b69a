// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
// Sets of names, and readers and writers of the manifest's structs.
#pragma once

#include <cstdint>
#include <string>

#include "bundle/json.h"
#include "sinkrt/manifest.h"

namespace sinkrt {

struct Dtype {
  const char* name;
  int64_t bytes;
  const char* safetensors;
};
constexpr Dtype kDtypes[] = {
    {"float32", 4, "F32"}, {"float16", 2, "F16"}, {"int64", 8, "I64"}, {"int32", 4, "I32"}, {"int8", 1, "I8"}};
constexpr const char* kSinkK = "sink_k";
constexpr const char* kSinkV = "sink_v";
constexpr const char* kWindowK = "window_k";
constexpr const char* kWindowV = "window_v";
constexpr const char* kWindowKScale = "window_k_scale";
constexpr const char* kWindowVScale = "window_v_scale";
constexpr const char* kAttentionMass = "attention_mass";
constexpr const char* kConv = "conv";
constexpr const char* kRecurrent = "recurrent";
constexpr const char* kTargets[] = {"onnx", "cpu", "tensorrt"};
constexpr const char* kFloatDtypes[] = {"float32", "float16"};
constexpr const char* kWeightKinds[] = {"float", "int8", "int4"};
constexpr const char* kActivationKinds[] = {"float", "dynamic", "static"};
constexpr const char* kWindowKinds[] = {"fp", "int8"};
constexpr const char* kFlavours[] = {"TensorRT", "TensorRT-RTX"};
constexpr const char* kStateKinds[] = {kSinkK, kSinkV, kWindowK, kWindowV};
constexpr const char* kScaleKinds[] = {kWindowKScale, kWindowVScale};
constexpr const char* kRecurrentKinds[] = {kConv, kRecurrent};
constexpr const char* kAllKinds[] = {kSinkK,        kSinkV,         kWindowK, kWindowV,  kWindowKScale,
                                     kWindowVScale, kAttentionMass, kConv,    kRecurrent};

// Read strictly: no unknown key, no missing one, no wrong type, and every rule of the contract. where: name for
// messages. Throw Error(kBundle).
void read(const Json& raw, const std::string& where, TensorSpec& out);
void read(const Json& raw, const std::string& where, StateSpec& out);
void read(const Json& raw, const std::string& where, GraphSpec& out);
void read(const Json& raw, const std::string& where, ModelFacts& out);
void read(const Json& raw, const std::string& where, AttentionCache& out);
void read(const Json& raw, const std::string& where, StreamFacts& out);
void read(const Json& raw, const std::string& where, TokenizerFacts& out);
void read(const Json& raw, const std::string& where, FileFacts& out);
void read(const Json& raw, const std::string& where, Quantization& out);
void read(const Json& raw, const std::string& where, ActTuning& out);
void read(const Json& raw, const std::string& where, SinkTuning& out);
void read(const Json& raw, const std::string& where, AffineAttention& out);
void read(const Json& raw, const std::string& where, HeadWindow& out);
void read(const Json& raw, const std::string& where, EngineFacts& out);
void read(const Json& raw, const std::string& where, Manifest& out);

Json toJson(const TensorSpec& value);
Json toJson(const StateSpec& value);
Json toJson(const GraphSpec& value);
Json toJson(const ModelFacts& value);
Json toJson(const AttentionCache& value);
Json toJson(const StreamFacts& value);
Json toJson(const TokenizerFacts& value);
Json toJson(const FileFacts& value);
Json toJson(const Quantization& value);
Json toJson(const ActTuning& value);
Json toJson(const SinkTuning& value);
Json toJson(const AffineAttention& value);
Json toJson(const HeadWindow& value);
Json toJson(const EngineFacts& value);
Json toJson(const Manifest& value);

// Rules between the fields of one struct: by hand, in checks.cpp. Throw Error(kBundle).
void check(const TensorSpec& value);
void check(const StateSpec& value);
void check(const ModelFacts& value);
void check(const AttentionCache& value);
void check(const StreamFacts& value);
void check(const ActTuning& value);
void check(const SinkTuning& value);
void check(const HeadWindow& value);
void check(const Manifest& value);

}  // namespace sinkrt
