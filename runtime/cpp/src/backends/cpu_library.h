// This project's kernels for ONNX Runtime on a CPU (plugins/cpu): found, checked. Twin of
// runtime/sinkrt/backends/cpu_library.py.
#pragma once

#include <string>

#include "sinkrt/backend.h"

namespace sinkrt {

// The library's path, if it has operators of the manifest's version and runs on this processor: options.plugin_library,
// else $SINKEXPORT_CPU_LIBRARY, else what the loader finds. Throws Error(kBackend).
std::string checkedCpuLibrary(const Manifest& manifest, const BackendOptions& options);

}  // namespace sinkrt
