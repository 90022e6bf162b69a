#include "allocations.h"

#include <cstdlib>
#include <new>

namespace heap {

std::atomic<bool> counting{false};
std::atomic<int64_t> num_new{0}, num_malloc{0};

}  // namespace heap

namespace {

using heap::num_malloc;
using heap::num_new;

void count(std::atomic<int64_t>& counter) {
  if (heap::counting.load(std::memory_order_relaxed)) ++counter;
}

}  // namespace

extern "C" {
void* __libc_malloc(size_t) noexcept;
void* __libc_calloc(size_t, size_t) noexcept;
void* __libc_realloc(void*, size_t) noexcept;
void* malloc(size_t size) noexcept {
  count(num_malloc);
  return __libc_malloc(size);
}
void* calloc(size_t number, size_t size) noexcept {
  count(num_malloc);
  return __libc_calloc(number, size);
}
void* realloc(void* memory, size_t size) noexcept {
  count(num_malloc);
  return __libc_realloc(memory, size);
}
}

void* operator new(size_t size) {
  count(num_new);
  if (void* memory = __libc_malloc(size > 0 ? size : 1)) return memory;
  throw std::bad_alloc();
}
void* operator new[](size_t size) {
  return operator new(size);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, size_t) noexcept {
  std::free(memory);
}
