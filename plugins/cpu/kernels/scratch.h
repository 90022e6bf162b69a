// Memory for what a kernel keeps between its own loops. It grows to the largest request and is kept: a step that has
// run once allocates nothing more.
#pragma once

#include <cstddef>

namespace sinkexport::cpu {

class Scratch {
 public:
  static constexpr size_t kAlignment = 64;

  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // At least `bytes`, 64-byte aligned, undefined contents; what an earlier call gave is no longer valid.
  // Raises std::bad_alloc.
  char* reserve(size_t bytes);

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Cuts a reserved piece of memory into arrays, each 64-byte aligned. With null it only counts: bytes() is what to
// reserve. Inlined always: the linker could keep a copy that was compiled for a newer processor (simd.h).
class Slices {
 public:
  __attribute__((always_inline)) explicit Slices(char* memory) : memory_(memory) {}

  template <typename T>
  __attribute__((always_inline)) T* take(size_t count) {
    char* slice = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += (count * sizeof(T) + Scratch::kAlignment - 1) / Scratch::kAlignment * Scratch::kAlignment;
    return reinterpret_cast<T*>(slice);
  }
  __attribute__((always_inline)) size_t bytes() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

}  // namespace sinkexport::cpu
