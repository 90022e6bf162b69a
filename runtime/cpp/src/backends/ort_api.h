// The part of ONNX Runtime's C interface that is used here, loaded at run time: no header and no library of it is
// needed to build. Its interface is a table of function pointers that only ever grows at its end, so an entry is known
// by its place; the types are those of ONNX Runtime's documentation. Tried with 1.32; opset 24 needs a recent one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace sinkrt {

// Opaque types of ONNX Runtime.
struct OrtEnv;
struct OrtStatus;
struct OrtMemoryInfo;
struct OrtIoBinding;
struct OrtSession;
struct OrtValue;
struct OrtRunOptions;
struct OrtTypeInfo;
struct OrtTensorInfo;
struct OrtSessionOptions;
struct OrtAllocator;
struct OrtModelMetadata;

// Place in the table and type of each entry, under its documented name.
template <size_t kPlace, typename Function>
struct OrtEntry {
  using Type = Function;
  static constexpr size_t kIndex = kPlace;
};

namespace ort {
using GetErrorCode = OrtEntry<1, int(const OrtStatus*)>;
using GetErrorMessage = OrtEntry<2, const char*(const OrtStatus*)>;
using CreateEnv = OrtEntry<3, OrtStatus*(int severity, const char* name, OrtEnv**)>;
using CreateSession = OrtEntry<7, OrtStatus*(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**)>;
using CreateSessionOptions = OrtEntry<10, OrtStatus*(OrtSessionOptions**)>;
using SetSessionExecutionMode = OrtEntry<13, OrtStatus*(OrtSessionOptions*, int mode)>;
using DisableMemPattern = OrtEntry<17, OrtStatus*(OrtSessionOptions*)>;
using SetSessionLogSeverityLevel = OrtEntry<22, OrtStatus*(OrtSessionOptions*, int severity)>;
using SetIntraOpNumThreads = OrtEntry<24, OrtStatus*(OrtSessionOptions*, int threads)>;
using RegisterCustomOpsLibrary = OrtEntry<29, OrtStatus*(OrtSessionOptions*, const char* path, void** library)>;
using SessionGetInputCount = OrtEntry<30, OrtStatus*(const OrtSession*, size_t*)>;
using SessionGetOutputCount = OrtEntry<31, OrtStatus*(const OrtSession*, size_t*)>;
using SessionGetInputTypeInfo = OrtEntry<33, OrtStatus*(const OrtSession*, size_t, OrtTypeInfo**)>;
using SessionGetOutputTypeInfo = OrtEntry<34, OrtStatus*(const OrtSession*, size_t, OrtTypeInfo**)>;
using SessionGetInputName = OrtEntry<36, OrtStatus*(const OrtSession*, size_t, OrtAllocator*, char**)>;
using SessionGetOutputName = OrtEntry<37, OrtStatus*(const OrtSession*, size_t, OrtAllocator*, char**)>;
using CreateRunOptions = OrtEntry<39, OrtStatus*(OrtRunOptions**)>;
using CreateTensorWithDataAsOrtValue =
    OrtEntry<49, OrtStatus*(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t rank, int type,
                            OrtValue**)>;
using CastTypeInfoToTensorInfo = OrtEntry<55, OrtStatus*(const OrtTypeInfo*, const OrtTensorInfo**)>;
using GetTensorElementType = OrtEntry<60, OrtStatus*(const OrtTensorInfo*, int*)>;
using GetDimensionsCount = OrtEntry<61, OrtStatus*(const OrtTensorInfo*, size_t*)>;
using GetDimensions = OrtEntry<62, OrtStatus*(const OrtTensorInfo*, int64_t*, size_t)>;
using CreateCpuMemoryInfo = OrtEntry<69, OrtStatus*(int allocator, int memory, OrtMemoryInfo**)>;
using AllocatorFree = OrtEntry<76, OrtStatus*(OrtAllocator*, void*)>;
using GetAllocatorWithDefaultOptions = OrtEntry<78, OrtStatus*(OrtAllocator**)>;
using ReleaseEnv = OrtEntry<92, void(OrtEnv*)>;
using ReleaseStatus = OrtEntry<93, void(OrtStatus*)>;
using ReleaseMemoryInfo = OrtEntry<94, void(OrtMemoryInfo*)>;
using ReleaseSession = OrtEntry<95, void(OrtSession*)>;
using ReleaseValue = OrtEntry<96, void(OrtValue*)>;
using ReleaseRunOptions = OrtEntry<97, void(OrtRunOptions*)>;
using ReleaseTypeInfo = OrtEntry<98, void(OrtTypeInfo*)>;
using ReleaseSessionOptions = OrtEntry<100, void(OrtSessionOptions*)>;
using SessionGetModelMetadata = OrtEntry<111, OrtStatus*(const OrtSession*, OrtModelMetadata**)>;
using ModelMetadataLookupCustomMetadataMap =
    OrtEntry<116, OrtStatus*(const OrtModelMetadata*, OrtAllocator*, const char* key, char** value)>;
using ReleaseModelMetadata = OrtEntry<118, void(OrtModelMetadata*)>;
using AddSessionConfigEntry = OrtEntry<130, OrtStatus*(OrtSessionOptions*, const char* key, const char* value)>;
using RunWithBinding = OrtEntry<133, OrtStatus*(OrtSession*, const OrtRunOptions*, const OrtIoBinding*)>;
using CreateIoBinding = OrtEntry<134, OrtStatus*(OrtSession*, OrtIoBinding**)>;
using ReleaseIoBinding = OrtEntry<135, void(OrtIoBinding*)>;
using BindInput = OrtEntry<136, OrtStatus*(OrtIoBinding*, const char* name, const OrtValue*)>;
using BindOutput = OrtEntry<137, OrtStatus*(OrtIoBinding*, const char* name, const OrtValue*)>;
using AddInitializer = OrtEntry<150, OrtStatus*(OrtSessionOptions*, const char* name, const OrtValue*)>;

constexpr int kDeviceAllocator = 0, kDefaultMemory = 0;  // of CreateCpuMemoryInfo
}  // namespace ort

// Element types (ONNXTensorElementDataType) of the manifest's dtypes; 0: unknown.
int ortType(const std::string& dtype);
std::string ortTypeName(int type);

// What went wrong inside ONNX Runtime: the first line of its message.
struct OrtFailure {
  std::string message;
  bool out_of_memory;
};

// The loaded library. It stays loaded until the process ends: it keeps threads that cannot be taken away from under it.
class OrtApi {
 public:
  // path: of the library; empty: $SINKRT_ONNXRUNTIME, then what the loader finds. Throws Error(kBackend).
  static const OrtApi& load(const std::string& path);

  // One for the process, as ONNX Runtime wants it.
  OrtEnv* environment() const { return environment_; }

  // For entries without a status.
  template <typename Entry, typename... Args>
  auto plain(Args... args) const {
    return reinterpret_cast<typename Entry::Type*>(table_[Entry::kIndex])(args...);
  }

  // For entries with a status. Throws OrtFailure.
  template <typename Entry, typename... Args>
  void call(Args... args) const {
    if (OrtStatus* status = plain<Entry>(args...)) fail(status);
  }

 private:
  explicit OrtApi(const std::string& path);
  [[noreturn]] void fail(OrtStatus* status) const;

  void* const* table_ = nullptr;
  OrtEnv* environment_ = nullptr;  // never released, like the library
};

// Owns an object of ONNX Runtime.
template <typename T, typename Release>
class OrtOwned {
 public:
  OrtOwned() = default;
  OrtOwned(const OrtApi& api, T* object) : api_(&api), object_(object) {}
  OrtOwned(OrtOwned&& other) noexcept : api_(other.api_), object_(other.object_) { other.object_ = nullptr; }
  OrtOwned& operator=(OrtOwned&& other) noexcept {
    std::swap(api_, other.api_);
    std::swap(object_, other.object_);
    return *this;
  }
  ~OrtOwned() {
    if (object_ != nullptr) api_->plain<Release>(object_);
  }
  T* get() const { return object_; }

 private:
  const OrtApi* api_ = nullptr;
  T* object_ = nullptr;
};

}  // namespace sinkrt
