// Counts of what the whole process allocates, this program, the runtime, CUDA and TensorRT: by replacing operator new
// and glibc's malloc.
#pragma once

#include <atomic>
#include <cstdint>

namespace heap {

// Whether calls are counted.
extern std::atomic<bool> counting;
extern std::atomic<int64_t> num_new, num_malloc;

}  // namespace heap
