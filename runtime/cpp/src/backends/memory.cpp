#include "backends/memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>

#include "files.h"
#include "sinkrt/error.h"

namespace sinkrt {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;  // of x86-64, and of ARM with small pages of 4 KiB
constexpr int64_t kMostBytes = int64_t{1} << 62;

size_t padded(size_t bytes, size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

}  // namespace

void refuseMemory(const std::string& received, int64_t bytes) {
  throw Error(Code::kOutOfMemory, problem("memory", received, std::to_string(bytes) + " bytes for the cache",
                                          "export with a smaller --window or --batch"));
}

int64_t availableBytes() {
  const File file(std::fopen("/proc/meminfo", "r"));
  long long kib = 0;
  char line[256];
  while (file && std::fgets(line, sizeof line, file.get()) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %lld", &kib) == 1) return int64_t{kib} * 1024;
  }
  return 0;
}

Buffer::Buffer(int64_t bytes) : size_(static_cast<size_t>(bytes)) {
  if (bytes >= kMostBytes || (data_ = static_cast<char*>(std::aligned_alloc(
                                  kAlignment, padded(std::max<size_t>(size_, 1), kAlignment)))) == nullptr) {
    refuseMemory("too little", bytes);
  }
  clear();
}

Buffer::~Buffer() {
  std::free(data_);
}

void Buffer::clear() {
  std::memset(data_, 0, size_);
}

StateMemory::StateMemory(const std::vector<int64_t>& bytes) {
  for (const int64_t size : bytes) {
    if (size >= kMostBytes - static_cast<int64_t>(bytes_)) refuseMemory("too little", size);
    places_.push_back({bytes_, static_cast<size_t>(size)});
    bytes_ += padded(static_cast<size_t>(size), kAlignment);
  }
  mapped_bytes_ = bytes_ + kHugePage;
  mapped_ = ::mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) refuseMemory("too little", static_cast<int64_t>(bytes_));
  data_ = reinterpret_cast<char*>(padded(reinterpret_cast<size_t>(mapped_), kHugePage));
#ifdef MADV_HUGEPAGE
  // Whole huge pages only, so that no more memory is taken than asked for. A kernel without them refuses: no harm.
  ::madvise(data_, bytes_ / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  clear();  // touches every page now, rather than in the first steps
}

StateMemory::~StateMemory() {
  ::munmap(mapped_, mapped_bytes_);
}

void StateMemory::clear() {
  std::memset(data_, 0, bytes_);
}

}  // namespace sinkrt
