#include "backends/cpu_library.h"

#include <cstdlib>

#include <dlfcn.h>

#include "backends/shared_library.h"
#include "sinkrt/constants.h"
#include "sinkrt/error.h"

namespace sinkrt {
namespace {

[[noreturn]] void refuse(const std::string& received, const std::string& expected, const std::string& fix) {
  throw Error(Code::kBackend, problem("CPU library", received, expected, fix));
}

}  // namespace

std::string checkedCpuLibrary(const Manifest& manifest, const BackendOptions& options) {
  const std::string install =
      std::string("build plugins/cpu and set ") + kCpuLibraryVariable + " to its path, or export with --target onnx";
  const char* named = std::getenv(kCpuLibraryVariable);
  const std::string path = !options.plugin_library.empty()        ? options.plugin_library
                           : named != nullptr && named[0] != '\0' ? named
                                                                  : kCpuLibrary;
  std::string why;
  void* library = openLibrary(path, RTLD_NOW | RTLD_LOCAL, why);  // never closed: sessions use it
  if (library == nullptr) refuse("no library that loads (" + why + ")", kCpuLibrary, install);
  using Function = const char* (*)();
  const auto abi_of = reinterpret_cast<Function>(::dlsym(library, "sinkexport_cpu_abi"));
  const auto problem_of = reinterpret_cast<Function>(::dlsym(library, "sinkexport_cpu_problem"));
  if (abi_of == nullptr || problem_of == nullptr || ::dlsym(library, "RegisterCustomOps") == nullptr)
    refuse("'" + path + "', which is another library", kCpuLibrary, install);
  const std::string wanted = manifest.plugin_abi.value_or("none");
  if (wanted != kCpuAbi) refuse("a bundle for its version " + wanted, kCpuAbi, "export the model again");
  const char* abi = abi_of();
  const std::string found = abi == nullptr ? "none" : abi;
  if (found != wanted) {
    refuse("version " + found + " at '" + path + "'", "version " + wanted, "build the library of this version");
  }
  if (const char* reason = problem_of()) {
    throw Error(Code::kBackend, "CPU library: " + std::string(reason) + "; change it, or export with --target onnx");
  }
  return path;
}

}  // namespace sinkrt
