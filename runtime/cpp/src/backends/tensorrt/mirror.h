// Many arrays in one block that exists on the host and on the device alike, so that one copy moves them all.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "cuda/device.h"

namespace sinkrt {

// An array in a block: where it begins, in bytes, and its shape in elements of T.
template <typename T>
struct Field {
  size_t offset = 0;
  std::vector<int64_t> shape;

  size_t bytes() const {
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    return static_cast<size_t>(count) * sizeof(T);
  }
};

// Lays arrays out one behind the other, each aligned.
class Layout {
 public:
  template <typename T>
  void add(Field<T>& field, std::vector<int64_t> shape) {
    field = {size_, std::move(shape)};
    size_ += cuda::aligned(field.bytes());
  }
  size_t size() const { return size_; }

 private:
  size_t size_ = 0;
};

// The block.
class Mirror {
 public:
  Mirror() = default;
  Mirror(size_t bytes, const char* purpose) : host_(bytes), device_(bytes, purpose) {}

  template <typename T>
  T* host(const Field<T>& field) const {
    return reinterpret_cast<T*>(host_.data() + field.offset);
  }
  template <typename T>
  T* device(const Field<T>& field) const {
    return reinterpret_cast<T*>(device_.data() + field.offset);
  }

  // Copy the bytes from `begin` to `end`.
  void upload(size_t begin, size_t end, cudaStream_t stream) const {
    cuda::check(
        cudaMemcpyAsync(device_.data() + begin, host_.data() + begin, end - begin, cudaMemcpyHostToDevice, stream),
        "upload");
  }
  void download(size_t begin, size_t end, cudaStream_t stream) const {
    cuda::check(
        cudaMemcpyAsync(host_.data() + begin, device_.data() + begin, end - begin, cudaMemcpyDeviceToHost, stream),
        "download");
  }

 private:
  cuda::Pinned host_;
  cuda::Memory device_;
};

}  // namespace sinkrt
