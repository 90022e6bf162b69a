// Runs a kernel on the host: a block at a time, a thread of the system for each of its threads. Slow, and exact.
//
// To be included before the kernel. Barriers and shuffles are real, so that what is missing hangs or shows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <pthread.h>

#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "overlap.cuh"  // launches too, which have fields of names that are taken here

#include "cuda_words.h"
#define threadIdx on_host::thread_index
#define blockIdx on_host::block_index
#define blockDim on_host::block_dim
#define __syncthreads on_host::syncThreads
#define __shfl_xor_sync on_host::shuffleXor

namespace on_host {

struct Index {
  unsigned x, y;
};
struct Barrier {
  pthread_barrier_t barrier;
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
};

inline thread_local Index thread_index;
inline Index block_index, block_dim;
inline std::unique_ptr<Barrier> block_barrier;
inline std::vector<std::unique_ptr<Barrier>> warp_barriers;
inline std::vector<float> lanes;

inline void syncThreads() {
  block_barrier->wait();
}

inline float shuffleXor(unsigned, float value, int mask) {
  const unsigned thread = thread_index.y * block_dim.x + thread_index.x;
  Barrier& warp = *warp_barriers[thread / 32];
  lanes[thread] = value;
  warp.wait();
  const float other = lanes[thread ^ static_cast<unsigned>(mask)];
  warp.wait();
  return other;
}

template <typename Params>
void run(void (*kernel)(Params), Index grid, Index block, const Params& params) {
  const unsigned count = block.x * block.y;
  block_dim = block;
  block_barrier = std::make_unique<Barrier>(count);
  warp_barriers.clear();
  for (unsigned i = 0; i < count / 32; ++i) warp_barriers.push_back(std::make_unique<Barrier>(32));
  lanes.assign(count, 0.0f);
  for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
      std::vector<std::thread> threads;
      for (unsigned i = 0; i < count; ++i) {
        threads.emplace_back([=] {
          thread_index = {i % block.x, i / block.x};
          kernel(params);
        });
      }
      for (std::thread& thread : threads) thread.join();
    }
  }
}

}  // namespace on_host
