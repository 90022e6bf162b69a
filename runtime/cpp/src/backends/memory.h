// Memory of a session on the CPU: buffers, and the states in one piece. Twin of
// runtime/sinkrt/backends/state_memory.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sinkrt {

constexpr size_t kAlignment = 64;  // a cache line, and what vector kernels like best

[[noreturn]] void refuseMemory(const std::string& received, int64_t bytes);

// Memory that is free or can be freed at once; 0 where the system does not say.
int64_t availableBytes();

// Aligned, and zero: slots that hold no token yet are masked, but NaN times a weight of zero would be NaN. Throws
// Error(kOutOfMemory).
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }
  ~Buffer();

  void clear();
  char* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* data_ = nullptr;
  size_t size_;
};

// The states of a session one after the other, each aligned, in huge pages where the system has them: a step reads all
// of them, and in pages of 4 KiB it would miss the translation of addresses most of the time. Zero like Buffer, and
// throws what it throws.
class StateMemory {
 public:
  // bytes: of each state.
  explicit StateMemory(const std::vector<int64_t>& bytes);
  StateMemory(const StateMemory&) = delete;
  StateMemory& operator=(const StateMemory&) = delete;
  ~StateMemory();

  void clear();
  size_t count() const { return places_.size(); }
  char* data(size_t state) const { return data_ + places_[state].start; }
  size_t size(size_t state) const { return places_[state].size; }

 private:
  struct Place {
    size_t start, size;
  };
  std::vector<Place> places_;
  size_t bytes_ = 0;
  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  char* data_ = nullptr;
};

}  // namespace sinkrt
