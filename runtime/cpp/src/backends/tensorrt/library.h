// TensorRT's shared library and this project's plugin in it, found when the program runs: libsinkrt links neither.
// Everything but the functions here is virtual in TensorRT's headers, which decide the major version that fits.
#pragma once

#include <NvInferRuntime.h>

#include <chrono>
#include <mutex>
#include <optional>
#include <string>

#if NV_TENSORRT_MAJOR < 10 && !defined(SINKRT_TENSORRT_RTX)
#define SINKRT_TENSORRT_8 1
#if NV_TENSORRT_MAJOR != 8 || NV_TENSORRT_MINOR < 5
#error "TensorRT 8.5, 8.6, 10.3 or newer, or TensorRT-RTX is needed"
#endif
#endif

namespace sinkrt {

// Keeps TensorRT's errors for the messages of exceptions, and prints nothing unless asked to.
class TensorrtLogger final : public nvinfer1::ILogger {
 public:
  // Write every message to stderr from now on, behind the seconds since this call.
  void echo();
  void log(Severity severity, const char* text) noexcept override;
  // What has been said since the last call, on one line; "nothing" if so.
  std::string takeErrors();

 private:
  std::mutex mutex_;
  std::string errors_;
  std::optional<std::chrono::steady_clock::time_point> echo_since_;
};

class TensorrtLibrary {
 public:
  // The process's only one: TensorRT keeps pointers to its logger, and plugins stay registered.
  // Throws Error(kBackend) if there is no library, or one of another major version than the headers of this build.
  static TensorrtLibrary& get();

  static const char* flavour();                            // TensorRT | TensorRT-RTX
  const std::string& version() const { return version_; }  // as "8.5.3"
  TensorrtLogger& logger() { return logger_; }

  nvinfer1::IRuntime* createRuntime();
  // A function of libnvinfer. Throws Error(kBackend) if it has none of that name.
  void* symbol(const char* name) const;
  // A number as TensorRT's factory functions want it.
  int32_t number() const { return number_; }

  // Make the plugin known; empty path: `fallback`, then the loader's path. Returns its ABI. Throws Error(kBackend).
  std::string loadPlugin(const std::string& path, const std::string& fallback);

 private:
  TensorrtLibrary();

  void* handle_ = nullptr;
  int32_t number_ = 0;
  std::string version_;
  TensorrtLogger logger_;
  std::mutex mutex_;
  std::string plugin_;  // the path of the one that is loaded
};

}  // namespace sinkrt
