// One graph's TensorRT engine, and the device memory that TensorRT takes.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backends/tensorrt/library.h"
#include "cuda/device.h"
#include "sinkrt/error.h"
#include "sinkrt/manifest.h"

namespace sinkrt {

// TensorRT's device memory comes from here, so that it is counted, and so that a lack of it is known as such.
class Allocator final : public nvinfer1::IGpuAllocator {
 public:
  void* allocate(uint64_t size, uint64_t, nvinfer1::AllocatorFlags) noexcept override {
    if (size == 0) return nullptr;
    void* memory = cuda::tryAllocate(size);
    if (memory == nullptr) refused_bytes_ = size;
    return memory;
  }
  bool deallocate(void* memory) noexcept override {
    cuda::release(memory);
    return true;
  }
#if defined(SINKRT_TENSORRT_8)
  void free(void* memory) noexcept override { cuda::release(memory); }
#endif

  uint64_t takeRefused() { return std::exchange(refused_bytes_, 0); }

 private:
  uint64_t refused_bytes_ = 0;
};

// An engine, ready to be bound and run.
class Engine {
 public:
  // path: of the engine's file. Throws Error(kBackend), Error(kOutOfMemory).
  Engine(TensorrtLibrary& library, nvinfer1::IRuntime& runtime, Allocator& allocator, std::string role,
         const std::string& path);

  // Device memory that a run needs, beside what is bound.
  size_t scratchBytes() const;
  void setScratch(const cuda::Memory& memory);

  // The engine must have exactly these tensors. Throws Error(kBackend).
  void compare(const std::vector<TensorSpec>& specs) const;

  // Tie a tensor to a device address. Throws Error(kBackend).
  void bind(const std::string& name, void* address);

  // Put a run on the stream. Throws Error(kBackend).
  void run(cudaStream_t stream);

 private:
  Error mismatch(const std::string& what, const std::string& received) const;
  Error refusal(Allocator& allocator, const char* expected);

  TensorrtLibrary& library_;
  std::string role_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

}  // namespace sinkrt
