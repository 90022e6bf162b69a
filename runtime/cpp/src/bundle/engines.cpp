#include "bundle/engines.h"

#include "files.h"

namespace sinkrt {
namespace {

constexpr const char* kRebuild = "build it on this machine: sinkexport build, or sinkrt_build";

// "8.5.3" of "8.5.3.1": the library reports no more, and no more decides.
std::string threeParts(const std::string& version) {
  size_t end = 0;
  for (int dots = 0; end < version.size(); ++end) {
    if (version[end] == '.' && ++dots == 3) break;
  }
  return version.substr(0, end);
}

[[noreturn]] void refuse(const std::string& what, const std::string& received, const std::string& expected) {
  throw Error(Code::kBackend, problem(what, received, expected, kRebuild));
}

}  // namespace

std::string checkEngine(const std::string& bundle, const Manifest& manifest, const std::string& role,
                        const EngineHost& host, bool hashes) {
  if (!manifest.engines || manifest.engines->count(role) == 0) refuse(role + " engine", "none", "one in the bundle");
  const EngineFacts& facts = manifest.engines->at(role);
  const std::string graph = manifest.files.at(manifest.graphs.at(role).file).sha256;
  const auto require = [&](const char* what, const std::string& here, const std::string& built) {
    if (here != built) refuse(role + " engine: " + what, "one that was built for " + built, here + ", as here");
  };
  require("its graph", graph.substr(0, 12), facts.graph_sha256.substr(0, 12));
  require("flavour", host.flavour, facts.flavour);
  require("version", threeParts(host.version), threeParts(facts.version));
  if (facts.plugin_abi) require("plugin ABI", host.plugin_abi.value_or("no plugin"), *facts.plugin_abi);
  if (facts.compute_capability) require("compute capability", host.compute_capability, *facts.compute_capability);

  const std::string path = joined(bundle, facts.file), expected = std::to_string(facts.bytes) + " bytes";
  const int64_t size = fileSize(path);
  if (size < 0) refuse("'" + facts.file + "'", "no such file", expected);
  if (size != facts.bytes) refuse("'" + facts.file + "'", std::to_string(size) + " bytes", expected);
  if (hashes && hashFile(path).sha256 != facts.sha256)
    refuse("'" + facts.file + "'", "other content", "what was built");
  return path;
}

}  // namespace sinkrt
