#include "spin_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace sinkexport::cpu {
namespace {

constexpr auto kSpin = std::chrono::microseconds(2000);  // then a waiting thread sleeps

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

struct SpinPool::Shared {
  // Counts calls: a change is the signal to start.
  alignas(64) std::atomic<uint64_t> call{0};
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> running{0};  // helpers that have not yet ended this call
  alignas(64) std::atomic<bool> is_taken{false};
  std::atomic<bool> ends{false};
  std::atomic<int> sleepers{0};
  int64_t tasks = 0;
  void (*task)(void*, int64_t) = nullptr;
  void* argument = nullptr;
  std::mutex mutex;
  std::condition_variable woken;
  std::vector<std::thread> helpers;

  void takeTasks() {
    for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) task(argument, i);
  }
};

SpinPool::SpinPool(int threads) : threads_(threads < 1 ? 1 : threads), shared_(new Shared) {
  for (int i = 1; i < threads_; ++i) shared_->helpers.emplace_back([this] { work(*shared_); });
}

SpinPool::~SpinPool() {
  shared_->ends = true;
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->call.fetch_add(1);
  }
  shared_->woken.notify_all();
  for (std::thread& helper : shared_->helpers) helper.join();
  delete shared_;
}

void SpinPool::run(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  Shared& shared = *static_cast<SpinPool*>(pool)->shared_;
  if (shared.is_taken.exchange(true)) {
    for (int64_t i = 0; i < tasks; ++i) task(argument, i);
    return;
  }
  shared.tasks = tasks;
  shared.task = task;
  shared.argument = argument;
  shared.next.store(0, std::memory_order_relaxed);
  shared.running.store(static_cast<int>(shared.helpers.size()), std::memory_order_relaxed);
  shared.call.fetch_add(1);  // sequentially consistent, like `sleepers`: one of the two sees the other
  if (shared.sleepers.load() > 0) {
    {
      std::lock_guard<std::mutex> lock(shared.mutex);
    }
    shared.woken.notify_all();
  }
  shared.takeTasks();
  for (int turns = 0; shared.running.load(std::memory_order_acquire) > 0; ++turns) {
    if (turns % 4096 == 4095) std::this_thread::yield();  // a helper waits for this processor, maybe
    pause();
  }
  shared.is_taken.store(false, std::memory_order_release);
}

void SpinPool::work(Shared& shared) {
  uint64_t seen = 0;
  while (true) {
    const auto start = std::chrono::steady_clock::now();
    for (int turns = 1; shared.call.load(std::memory_order_acquire) == seen; ++turns) {
      pause();
      if (turns % 256 != 0 || std::chrono::steady_clock::now() - start < kSpin) continue;
      std::unique_lock<std::mutex> lock(shared.mutex);
      shared.sleepers.fetch_add(1);
      shared.woken.wait(lock, [&] { return shared.call.load() != seen; });
      shared.sleepers.fetch_sub(1);
    }
    if (shared.ends) return;
    ++seen;
    shared.takeTasks();
    shared.running.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace sinkexport::cpu
