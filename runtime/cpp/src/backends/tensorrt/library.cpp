#include "backends/tensorrt/library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "backends/shared_library.h"
#include "sinkrt/error.h"
#include "sinkrt/manifest.h"

namespace sinkrt {
namespace {

constexpr size_t kMaxErrors = 600;  // characters: one line has to stay readable

#if defined(SINKRT_TENSORRT_RTX)
constexpr const char* kLibraries[] = {"libtensorrt_rtx.so.1", "libtensorrt_rtx.so"};
#elif defined(SINKRT_TENSORRT_8)
constexpr const char* kLibraries[] = {"libnvinfer.so.8"};
#elif NV_TENSORRT_MAJOR == 10
constexpr const char* kLibraries[] = {"libnvinfer.so.10"};
#else
constexpr const char* kLibraries[] = {"libnvinfer.so.11", "libnvinfer.so"};
#endif

Error missing(const std::string& what, const std::string& received, const std::string& expected,
              const std::string& fix) {
  return {Code::kBackend, problem(what, received, expected, fix)};
}

std::string loaderError() {
  const char* text = dlerror();
  return text == nullptr ? "no reason" : text;
}

}  // namespace

void TensorrtLogger::log(Severity severity, const char* text) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (echo_since_) {
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - *echo_since_;
      std::fprintf(stderr, "%8.3f %d %s\n", seconds.count(), static_cast<int>(severity), text);
    }
    if (severity > Severity::kERROR) return;
    if (errors_.size() > kMaxErrors) return;
    if (!errors_.empty()) errors_ += " / ";
    for (const char* c = text; *c != '\0'; ++c) errors_ += *c == '\n' ? ' ' : *c;
  } catch (...) {  // out of memory: the message is lost, nothing else
  }
}

void TensorrtLogger::echo() {
  const std::lock_guard<std::mutex> lock(mutex_);
  echo_since_ = std::chrono::steady_clock::now();
}

std::string TensorrtLogger::takeErrors() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::string text = errors_.empty() ? "nothing" : errors_.substr(0, kMaxErrors);
  errors_.clear();
  return text;
}

TensorrtLibrary& TensorrtLibrary::get() {
  static TensorrtLibrary* const library = new TensorrtLibrary;  // never destroyed; tried again after a failure
  return *library;
}

const char* TensorrtLibrary::flavour() {
#if defined(SINKRT_TENSORRT_RTX)
  return "TensorRT-RTX";
#else
  return "TensorRT";
#endif
}

TensorrtLibrary::TensorrtLibrary() {
  std::string tried;
  // For all to see: a plugin of TensorRT 8 looks for the registry among the process's symbols.
  if (const char* path = std::getenv("SINKRT_TENSORRT")) {
    handle_ = openLibrary(path, RTLD_NOW | RTLD_GLOBAL, tried);
  } else {
    for (const char* name : kLibraries) {
      std::string why;
      if (handle_ == nullptr) handle_ = openLibrary(name, RTLD_NOW | RTLD_GLOBAL, why);
      if (handle_ == nullptr) tried += (tried.empty() ? "" : " / ") + why;
    }
  }
  if (handle_ == nullptr) {
    throw missing(flavour(), tried, kLibraries[0],
                  "add its folder to LD_LIBRARY_PATH, or set SINKRT_TENSORRT to its path");
  }
  const auto ask = [&](const char* name) {
    const auto function = reinterpret_cast<int32_t (*)()>(dlsym(handle_, name));
    return function == nullptr ? -1 : function();
  };
  number_ = ask("getInferLibVersion");
  int32_t major = ask("getInferLibMajorVersion"), minor = ask("getInferLibMinorVersion");
  int32_t patch = ask("getInferLibPatchVersion");
  if (major < 0) {  // 8.x has but one number, 8503 for 8.5.3
    major = number_ / 1000;
    minor = number_ / 100 % 10;
    patch = number_ % 100;
  }
  version_ = std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
#if !defined(SINKRT_TENSORRT_RTX)
  if (major != NV_TENSORRT_MAJOR) {
    throw missing(flavour(), version_, std::to_string(NV_TENSORRT_MAJOR) + ".x, whose headers this build has",
                  "install that, or build sinkrt against the headers of " + version_);
  }
#endif
}

void* TensorrtLibrary::symbol(const char* name) const {
  void* found = dlsym(handle_, name);
  if (found == nullptr) throw missing(flavour(), loaderError(), name, "install the whole of TensorRT");
  return found;
}

nvinfer1::IRuntime* TensorrtLibrary::createRuntime() {
  const auto create = reinterpret_cast<void* (*)(void*, int32_t)>(symbol("createInferRuntime_INTERNAL"));
  auto* runtime = static_cast<nvinfer1::IRuntime*>(create(&logger_, number_));
  if (runtime == nullptr) {
    throw missing(std::string(flavour()) + " runtime", logger_.takeErrors(), "one", "check the GPU's driver");
  }
  return runtime;
}

std::string TensorrtLibrary::loadPlugin(const std::string& path, const std::string& fallback) {
  constexpr const char* kName = "libsinkexport_plugin.so";
  const std::string file = !path.empty() ? path : access(fallback.c_str(), R_OK) == 0 ? fallback : kName;
  const std::string build = "build it as plugins/README.md says, and give its path";
  std::string why;
  void* plugin = openLibrary(file, RTLD_NOW | RTLD_GLOBAL, why);
  if (plugin == nullptr) throw missing("plugin", why, std::string("a readable ") + kName, build);
  const auto abi_of = reinterpret_cast<const char* (*)()>(dlsym(plugin, "sinkexport_plugin_abi"));
  const auto major_of = reinterpret_cast<int (*)()>(dlsym(plugin, "sinkexport_plugin_tensorrt_major"));
  if (abi_of == nullptr || major_of == nullptr)
    throw missing("plugin", "'" + file + "', another library", kName, build);
  const char* found = abi_of();
  const std::string abi = found == nullptr ? "none" : found;
  if (abi != kPluginAbi) throw missing("plugin", "ABI " + abi, std::string("ABI ") + kPluginAbi, build);
#if defined(SINKRT_TENSORRT_8)
  const bool fits = major_of() < 10;
#else
  const bool fits = major_of() >= 10;
#endif
  if (!fits) {
    throw missing("plugin", "one for TensorRT " + std::to_string(major_of()), "one for " + version_, build);
  }
#if !defined(SINKRT_TENSORRT_8)
  const std::lock_guard<std::mutex> lock(mutex_);
  if (plugin_ != file) {
    const auto registry_of = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(symbol("getPluginRegistry"));
    if (registry_of()->loadLibrary(file.c_str()) == nullptr) {
      throw missing("plugin", "'" + file + "' (" + logger_.takeErrors() + ")", "a library that TensorRT loads", build);
    }
    plugin_ = file;
  }
#endif
  return abi;
}

}  // namespace sinkrt
