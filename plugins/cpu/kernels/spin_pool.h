// Threads that wait for work by looking at a counter, for steps whose parts take microseconds. A thread that has found
// none for a while sleeps, so that an idle process uses no processor.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace sinkexport::cpu {

// One caller at a time: a second one that comes while a call runs does its tasks by itself.
class SpinPool {
 public:
  // `threads` counts the caller, 1 or more. Threads begin now. Raises std::system_error where none can be had.
  explicit SpinPool(int threads);
  SpinPool(const SpinPool&) = delete;
  SpinPool& operator=(const SpinPool&) = delete;
  ~SpinPool();

  Parallel parallel() { return {run, this, threads_}; }

 private:
  struct Shared;
  static void run(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument);
  static void work(Shared& shared);

  int threads_;
  Shared* shared_;
};

}  // namespace sinkexport::cpu
