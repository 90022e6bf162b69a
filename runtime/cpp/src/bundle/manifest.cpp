#include "sinkrt/manifest.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "bundle/checks.h"
#include "bundle/json_fields.h"
#include "bundle/schema.h"
#include "files.h"
#include "text/utf8.h"

namespace sinkrt {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

}  // namespace

int64_t dtypeBytes(const std::string& dtype) {
  for (const Dtype& known : kDtypes) {
    if (dtype == known.name) return known.bytes;
  }
  return 0;
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

bool StateSpec::isRecurrent() const {
  return std::find(std::begin(kRecurrentKinds), std::end(kRecurrentKinds), kind) != std::end(kRecurrentKinds);
}

bool Manifest::isRecurrent() const {
  return std::any_of(states.begin(), states.end(), [](const StateSpec& state) { return state.isRecurrent(); });
}

std::string Manifest::toJson() const {
  return dumpJson(sinkrt::toJson(*this), {1, true}) + "\n";
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
  read(raw, "manifest", out);
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

}  // namespace sinkrt
