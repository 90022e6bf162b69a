// The part of ONNX Runtime's C interface that custom operators need, without its headers. Its table of functions only
// ever grows at its end, so an entry is known by its place; the types are those of ONNX Runtime's documentation.
// Compared with the table and the struct of 1.32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace sinkexport::ort {

// Opaque types of ONNX Runtime.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorInfo;

// What the library's only export returns, and what RegisterCustomOps is given.
struct OrtApiBase {
  void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};

// The version of the interface that brought the newest entry used here: ParallelFor, in 1.17.
constexpr uint32_t kApiVersion = 17;

// Place in the table and type of each entry, under its documented name.
template <size_t kPlace, typename Function>
struct Entry {
  using Type = Function;
  static constexpr size_t kIndex = kPlace;
};

struct OrtCustomOp;

using CreateStatus = Entry<0, OrtStatus*(int code, const char* message)>;
using GetErrorMessage = Entry<2, const char*(const OrtStatus*)>;
using CreateCustomOpDomain = Entry<26, OrtStatus*(const char* name, OrtCustomOpDomain**)>;
using CustomOpDomainAdd = Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Entry<51, OrtStatus*(OrtValue*, void**)>;
using CastTypeInfoToTensorInfo = Entry<55, OrtStatus*(const OrtTypeInfo*, const OrtTensorInfo**)>;
using GetTensorElementType = Entry<60, OrtStatus*(const OrtTensorInfo*, int*)>;
using GetDimensionsCount = Entry<61, OrtStatus*(const OrtTensorInfo*, size_t*)>;
using GetDimensions = Entry<62, OrtStatus*(const OrtTensorInfo*, int64_t*, size_t)>;
using KernelInfoGetAttributeString =
    Entry<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* out, size_t* bytes)>;
using KernelContextGetInput = Entry<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using KernelContextGetOutput =
    Entry<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t* shape, size_t rank, OrtValue**)>;
using ReleaseStatus = Entry<93, void(OrtStatus*)>;
using ReleaseTypeInfo = Entry<98, void(OrtTypeInfo*)>;
using KernelInfoGetInputCount = Entry<230, OrtStatus*(const OrtKernelInfo*, size_t*)>;
using KernelInfoGetOutputCount = Entry<231, OrtStatus*(const OrtKernelInfo*, size_t*)>;
using KernelInfoGetInputTypeInfo = Entry<234, OrtStatus*(const OrtKernelInfo*, size_t, OrtTypeInfo**)>;
using KernelInfoGetOutputTypeInfo = Entry<235, OrtStatus*(const OrtKernelInfo*, size_t, OrtTypeInfo**)>;
using HasSessionConfigEntry = Entry<237, OrtStatus*(const OrtSessionOptions*, const char* key, int*)>;
using GetSessionConfigEntry = Entry<238, OrtStatus*(const OrtSessionOptions*, const char* key, char*, size_t* bytes)>;
using KernelInfoGetNodeName = Entry<244, OrtStatus*(const OrtKernelInfo*, char* out, size_t* bytes)>;
using KernelInfoGetConstantInput =
    Entry<249, OrtStatus*(const OrtKernelInfo*, size_t, int* is_constant, const OrtValue**)>;
using KernelContextParallelFor = Entry<274, OrtStatus*(const OrtKernelContext*, void (*)(void* argument, size_t index),
                                                       size_t total, size_t batches, void* argument)>;

// An operator, as ONNX Runtime asks for it (OrtCustomOp of version 17).
struct OrtCustomOp {
  uint32_t version;
  void* (*create_kernel)(const OrtCustomOp*, void* const* api, const OrtKernelInfo*);
  const char* (*name)(const OrtCustomOp*);
  const char* (*provider)(const OrtCustomOp*);
  int (*input_type)(const OrtCustomOp*, size_t);
  size_t (*input_count)(const OrtCustomOp*);
  int (*output_type)(const OrtCustomOp*, size_t);
  size_t (*output_count)(const OrtCustomOp*);
  void (*compute)(void* kernel, OrtKernelContext*);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const OrtCustomOp*, size_t);
  int (*output_characteristic)(const OrtCustomOp*, size_t);
  int (*input_memory)(const OrtCustomOp*, size_t);
  int (*least_inputs)(const OrtCustomOp*);
  int (*inputs_are_alike)(const OrtCustomOp*);
  int (*least_outputs)(const OrtCustomOp*);
  int (*outputs_are_alike)(const OrtCustomOp*);
  OrtStatus* (*create_kernel_v2)(const OrtCustomOp*, void* const* api, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*compute_v2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*infer_shapes)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*start_version)(const OrtCustomOp*);
  int (*end_version)(const OrtCustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};

constexpr int kFail = 1, kInvalidGraph = 10;  // error codes
constexpr int kVariadic = 2;                  // characteristic of inputs and outputs
constexpr int kDefaultMemory = 0;             // memory type
enum ElementType : int {                      // of tensors
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt64 = 7,
  kFloat16 = 10,
};

// The table of functions.
class Api {
 public:
  explicit Api(void* const* table) : table_(table) {}

  template <typename Named, typename... Args>
  auto plain(Args... args) const {
    return reinterpret_cast<typename Named::Type*>(table_[Named::kIndex])(args...);
  }

  // For entries with a status. Throws std::runtime_error with its message.
  template <typename Named, typename... Args>
  void call(Args... args) const {
    if (OrtStatus* status = plain<Named>(args...)) {
      const std::string message = plain<GetErrorMessage>(static_cast<const OrtStatus*>(status));
      plain<ReleaseStatus>(status);
      throw std::runtime_error(message);
    }
  }

  // For entries that may fail where that is an answer.
  template <typename Named, typename... Args>
  bool succeeds(Args... args) const {
    OrtStatus* status = plain<Named>(args...);
    if (status != nullptr) plain<ReleaseStatus>(status);
    return status == nullptr;
  }

  OrtStatus* status(int code, const char* message) const { return plain<CreateStatus>(code, message); }

 private:
  void* const* table_;
};

}  // namespace sinkexport::ort
