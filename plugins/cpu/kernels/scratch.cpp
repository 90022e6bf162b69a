#include "scratch.h"

#include <cstdlib>
#include <new>

namespace sinkexport::cpu {

Scratch::~Scratch() {
  std::free(memory_);
}

char* Scratch::reserve(size_t bytes) {
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

}  // namespace sinkexport::cpu
