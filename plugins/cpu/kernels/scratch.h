// Memory for what a kernel keeps between its own loops. It grows to the largest request and is kept: a step that has
// run once allocates nothing more.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace sinkexport::cpu {

class Scratch {
 public:
  static constexpr size_t kAlignment = 64;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least `bytes`, 64-byte aligned, undefined contents; what an earlier call gave is no longer valid.
  // Raises std::bad_alloc.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_ = std::aligned_alloc(kAlignment, bytes);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<char*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Cuts a reserved piece of memory into arrays, each 64-byte aligned. With null it only counts: bytes() is what to
// reserve.
class Slices {
 public:
  explicit Slices(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(size_t count) {
    char* slice = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * sizeof(T) + Scratch::kAlignment - 1) / Scratch::kAlignment * Scratch::kAlignment;
    return reinterpret_cast<T*>(slice);
  }
  size_t bytes() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace sinkexport::cpu
