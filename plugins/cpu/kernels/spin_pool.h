// Threads that wait for work by looking at a counter, for steps whose parts take microseconds. A thread that has found
// none for a while sleeps, so that an idle process uses no processor.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "reads.h"

namespace sinkexport::cpu {

// One caller at a time. Nobody waits for a helper that is not there, because it sleeps or because another program has
// its processor: the caller does what no helper has begun.
class SpinPool {
 public:
  // `threads` counts the caller, 1 or more. Threads begin now. Throws std::runtime_error where one cannot be
  // had: those that had begun have ended then.
  explicit SpinPool(int threads);
  SpinPool(const SpinPool&) = delete;
  SpinPool& operator=(const SpinPool&) = delete;
  ~SpinPool();

  // A second caller that comes while a call runs does its tasks by itself.
  Parallel parallel() { return {run, this, threads_}; }

  // The same for a caller that has something better to do: false, and nothing was done, while another call runs.
  bool tryRun(int64_t tasks, void (*task)(void* argument, int64_t index), void* argument);

  // What the call after the next one reads: helpers ask for it when their work has ended. Null: unknown.
  void expect(const Reads* reads);

 private:
  struct Shared;
  static void run(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument);
  void end();
  static void work(Shared& shared, int helper);

  int threads_;
  Shared* shared_;
};

}  // namespace sinkexport::cpu
