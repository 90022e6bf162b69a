#include "bundle/json.h"
#include "bundle/json_fields.h"
#include "bundle/schema.h"
#include "bundle/sha256.h"

namespace sinkrt {

// SHA-256 of the text that Python's Manifest.fingerprint hashes, byte for byte.
std::string Manifest::fingerprint() const {
  Json geometry = Json::object();
  for (auto& member : sinkrt::toJson(stream).members) {
    if (member.first != "chunk_size") geometry.members.push_back(std::move(member));
  }
  Json weights = Json::object();
  for (const auto& [path, facts] : files) {
    if (path.rfind("weights", 0) == 0) weights.add(path, sinkrt::toJson(facts.sha256));
  }
  Json facts;
  facts.type = Json::Type::kArray;
  facts.items = {sinkrt::toJson(model), std::move(geometry), sinkrt::toJson(weights_dtype), std::move(weights)};
  if (sink_tuning) facts.items.push_back(sinkrt::toJson(sink_tuning->sha256));  // later tokens were computed under it
  if (head_windows) facts.items.push_back(sinkrt::toJson(*head_windows));
  if (affine_attention) facts.items.push_back(sinkrt::toJson(affine_attention->sha256));
  if (attention) {
    Json caches = Json::object();
    caches.add("attention", sinkrt::toJson(*attention));
    facts.items.push_back(std::move(caches));
  }
  const std::string text = dumpJson(facts, {-1, true});
  Sha256 digest;
  digest.add(text.data(), text.size());
  return digest.hex();
}

}  // namespace sinkrt
