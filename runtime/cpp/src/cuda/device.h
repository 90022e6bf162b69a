// Memory, streams and graphs of CUDA as objects that free themselves and throw sinkrt::Error. What they allocate is
// counted, so that a test can show that a loop allocates nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

namespace sinkrt::cuda {

// What buffers start on, and what TensorRT wants of addresses that it is given.
constexpr size_t kAlignment = 256;

constexpr size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Throws Error(kBackend), or Error(kOutOfMemory) if that was it. what: the call, for messages.
void check(cudaError_t error, const char* what);

// Make the device the calling thread's. Throws Error(kBackend) if there is no such device or no driver. A context that
// an earlier error of this process has spoilt is reset: whatever lay in it was lost with that error.
void useDevice(int device);

// As "9.0".
std::string computeCapability(int device);

// How often this library has taken device or pinned memory, for itself or for TensorRT, in this process.
int64_t numAllocations();

// cudaMalloc and cudaFree, counted. Throws Error(kOutOfMemory). purpose: for the message.
void* allocate(size_t bytes, const char* purpose);
void release(void* memory) noexcept;
// The same, nullptr instead of an exception.
void* tryAllocate(size_t bytes) noexcept;

// Device memory, zero at first.
class Memory {
 public:
  Memory() = default;
  Memory(size_t bytes, const char* purpose);
  ~Memory() { release(data_); }
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

// Host memory that the device copies from and to without a detour, zero at first.
class Pinned {
 public:
  Pinned() = default;
  explicit Pinned(size_t bytes);
  ~Pinned();
  Pinned(Pinned&& other) noexcept { *this = std::move(other); }
  Pinned& operator=(Pinned&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
};

class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  operator cudaStream_t() const { return stream_; }
  // Throws Error(kBackend) with what has failed since the last call.
  void synchronize() const;

 private:
  cudaStream_t stream_ = nullptr;
};

// Copy within the device. Throws Error(kBackend).
void copy(char* target, const char* source, size_t bytes, const Stream& stream);

// Work that is recorded once and replayed as a whole.
class Graph {
 public:
  Graph() = default;
  ~Graph();
  Graph(Graph&& other) noexcept { *this = std::move(other); }
  Graph& operator=(Graph&& other) noexcept {
    std::swap(exec_, other.exec_);
    return *this;
  }

  // Record what `work` puts on the stream, without running it. False: something in it cannot be recorded, or `work`
  // threw; the stream is as it was.
  bool capture(const Stream& stream, const std::function<void()>& work);
  void launch(const Stream& stream) const;
  explicit operator bool() const { return exec_ != nullptr; }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace sinkrt::cuda
