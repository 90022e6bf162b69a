// Threads that a kernel may use. The kernels own none: ONNX Runtime's pool or spin_pool.h is handed in.
#pragma once

#include <cstdint>

namespace sinkexport::cpu {

struct Parallel {
  // Calls task(argument, 0 .. tasks - 1), each once, on any threads, and returns when all are done. Null: in turn here.
  void (*run)(void* pool, int64_t tasks, void (*task)(void* argument, int64_t index), void* argument) = nullptr;
  void* pool = nullptr;
  int threads = 1;  // how many tasks run at a time
};

// function(index) for 0 .. tasks - 1. Nothing is allocated.
template <typename Function>
void parallelFor(const Parallel& parallel, int64_t tasks, Function&& function) {
  if (parallel.run == nullptr || parallel.threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; ++i) function(i);
    return;
  }
  auto* argument = &function;
  parallel.run(
      parallel.pool, tasks, [](void* called, int64_t index) { (*static_cast<decltype(argument)>(called))(index); },
      argument);
}

}  // namespace sinkexport::cpu
