// Whether a TensorRT engine of 'sinkexport build' or sinkrt_build may run here, checked before it is loaded: TensorRT
// says little. Twin of runtime/sinkrt/engines.py.
#pragma once

#include <optional>
#include <string>

#include "sinkrt/manifest.h"

namespace sinkrt {

// What would run an engine. version: at least "8.5.3". plugin_abi: of the plugin library that is loaded, if one is.
// compute_capability: of the GPU, as "9.0".
struct EngineHost {
  std::string flavour;  // TensorRT | TensorRT-RTX
  std::string version;
  std::optional<std::string> plugin_abi;
  std::string compute_capability;
};

// The engine file of the graph `role`, if it is whole, was made of this very graph and runs on `host`. With `hashes`
// its SHA-256 is compared too, not only its size. Throws Error(kBackend) with the first reason why not.
std::string checkEngine(const std::string& bundle, const Manifest& manifest, const std::string& role,
                        const EngineHost& host, bool hashes);

}  // namespace sinkrt
