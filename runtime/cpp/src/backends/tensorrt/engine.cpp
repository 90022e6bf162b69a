#include "backends/tensorrt/engine.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

namespace sinkrt {
namespace {

// A file's content, mapped and not copied: engines hold gigabytes.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file >= 0 && fstat(file, &status) == 0 && status.st_size > 0) {
      size_ = static_cast<size_t>(status.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    }
    if (file >= 0) close(file);
    if (data_ == MAP_FAILED) {
      throw Error(Code::kBackend, problem("engine", "'" + path + "', which cannot be read", "a readable file",
                                          "build the engines again"));
    }
  }
  ~MappedFile() { munmap(data_, size_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  size_t size_ = 0;
};

std::string typeName(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "float32";
    case nvinfer1::DataType::kHALF:
      return "float16";
    case nvinfer1::DataType::kINT8:
      return "int8";
    case nvinfer1::DataType::kINT32:
      return "int32";
#if !defined(SINKRT_TENSORRT_8)
    case nvinfer1::DataType::kINT64:
      return "int64";
#endif
    default:
      return "another type";
  }
}

}  // namespace

Engine::Engine(TensorrtLibrary& library, nvinfer1::IRuntime& runtime, Allocator& allocator, std::string role,
               const std::string& path)
    : library_(library), role_(std::move(role)) {
  library_.logger().takeErrors();
  const MappedFile plan(path);
  engine_.reset(runtime.deserializeCudaEngine(plan.data(), plan.size()));
  if (engine_ == nullptr) throw refusal(allocator, "an engine that this TensorRT runs");
#if defined(SINKRT_TENSORRT_8)
  context_.reset(engine_->createExecutionContextWithoutDeviceMemory());
#else
  context_.reset(engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#endif
  if (context_ == nullptr) throw refusal(allocator, "an execution context");
}

size_t Engine::scratchBytes() const {
#if defined(SINKRT_TENSORRT_8)
  return engine_->getDeviceMemorySize();
#else
  return static_cast<size_t>(engine_->getDeviceMemorySizeV2());
#endif
}

void Engine::setScratch(const cuda::Memory& memory) {
#if defined(SINKRT_TENSORRT_8)
  context_->setDeviceMemory(memory.data());
#else
  context_->setDeviceMemoryV2(memory.data(), static_cast<int64_t>(memory.bytes()));
#endif
}

void Engine::compare(const std::vector<TensorSpec>& specs) const {
  for (const TensorSpec& spec : specs) {
    const nvinfer1::Dims dims = engine_->getTensorShape(spec.name.c_str());
    const std::vector<int64_t> shape(dims.d, dims.d + std::max(dims.nbDims, 0));
    if (shape != spec.shape || typeName(engine_->getTensorDataType(spec.name.c_str())) != spec.dtype) {
      throw mismatch("tensor '" + spec.name + "'", "none of that shape and type");
    }
  }
  if (engine_->getNbIOTensors() != static_cast<int32_t>(specs.size())) {
    throw mismatch("number of tensors", std::to_string(engine_->getNbIOTensors()));
  }
}

void Engine::bind(const std::string& name, void* address) {
  if (!context_->setTensorAddress(name.c_str(), address)) {
    throw mismatch("address of '" + name + "'", library_.logger().takeErrors());
  }
}

void Engine::run(cudaStream_t stream) {
  if (context_->enqueueV3(stream)) return;
  throw Error(Code::kBackend,
              problem(role_ + " run", library_.logger().takeErrors(), "a run without error", "load the session again"));
}

Error Engine::mismatch(const std::string& what, const std::string& received) const {
  return {Code::kBackend,
          problem(role_ + " engine: " + what, received, "what the manifest says", "build the engines again")};
}

Error Engine::refusal(Allocator& allocator, const char* expected) {
  if (const uint64_t bytes = allocator.takeRefused()) {
    return {Code::kOutOfMemory, problem("GPU memory", "too little for the " + role_ + " engine",
                                        std::to_string((bytes >> 20) + 1) + " MiB more in one piece",
                                        "free some, or export with a smaller window or an INT8 recipe")};
  }
  return {Code::kBackend, problem(role_ + " engine", library_.logger().takeErrors(), expected,
                                  "build the engines again, on this machine")};
}

}  // namespace sinkrt
