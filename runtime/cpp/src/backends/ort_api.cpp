#include "backends/ort_api.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include <dlfcn.h>

#include "backends/shared_library.h"
#include "sinkrt/error.h"

namespace sinkrt {
namespace {

// The version of the interface that brought the newest entry used here.
constexpr uint32_t kApiVersion = 6;
constexpr int kFatal = 4;  // nothing on stderr: errors are thrown, and reported where they are caught

// What the library's only export returns.
struct ApiBase {
  void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};

const struct {
  const char* dtype;
  int type;
} kTypes[] = {{"float32", 1}, {"int8", 3}, {"int32", 6}, {"int64", 7}, {"float16", 10}};

}  // namespace

int ortType(const std::string& dtype) {
  for (const auto& [name, type] : kTypes) {
    if (dtype == name) return type;
  }
  return 0;
}

std::string ortTypeName(int type) {
  for (const auto& [name, number] : kTypes) {
    if (type == number) return name;
  }
  return "type " + std::to_string(type);
}

const OrtApi& OrtApi::load(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, OrtApi> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find(path);
  return found != loaded.end() ? found->second : loaded.emplace(path, OrtApi(path)).first->second;
}

OrtApi::OrtApi(const std::string& path) {
  const char* wanted = path.empty() ? std::getenv("SINKRT_ONNXRUNTIME") : path.c_str();
  std::vector<std::string> names;
  if (wanted != nullptr && *wanted != '\0') {
    names = {wanted};
  } else {
    names = {"libonnxruntime.so.1", "libonnxruntime.so", "libonnxruntime.dylib"};
  }
  void* library = nullptr;
  std::string reason;
  for (const std::string& name : names) {
    std::string why;
    library = openLibrary(name, RTLD_NOW | RTLD_LOCAL, why);
    if (library != nullptr) break;
    if (reason.empty()) reason = why;
  }
  const auto refuse = [](const std::string& received) {
    throw Error(Code::kBackend,
                problem("ONNX Runtime", received, "libonnxruntime.so",
                        "set SINKRT_ONNXRUNTIME to its path (the Python package has one in onnxruntime/capi)"));
  };
  if (library == nullptr) refuse("no library that loads (" + reason + ")");
  const auto base = reinterpret_cast<const ApiBase* (*)()>(::dlsym(library, "OrtGetApiBase"));
  if (base == nullptr) refuse("a library without OrtGetApiBase");
  table_ = base()->get_api(kApiVersion);
  if (table_ == nullptr) refuse(std::string("version ") + base()->version() + ", which is too old");
  try {
    call<ort::CreateEnv>(kFatal, "sinkrt", &environment_);
  } catch (const OrtFailure& failure) {
    refuse(failure.message);
  }
}

void OrtApi::fail(OrtStatus* status) const {
  std::string message = plain<ort::GetErrorMessage>(static_cast<const OrtStatus*>(status));
  plain<ort::ReleaseStatus>(status);
  const bool memory =
      message.find("bad_alloc") != std::string::npos || message.find("Failed to allocate memory") != std::string::npos;
  message.erase(std::find(message.begin(), message.end(), '\n'), message.end());
  throw OrtFailure{message.substr(0, 200), memory};
}

}  // namespace sinkrt
