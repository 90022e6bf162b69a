#include "spin_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace sinkexport::cpu {
namespace {

constexpr auto kSpin = std::chrono::microseconds(1000);  // then a waiting thread sleeps: a host samples sooner
constexpr int64_t kMostTasks = 32767;                    // of one call: those beyond are a further call

// Lines that helpers ask for before there is work, in bytes: at a time, and in all.
constexpr int64_t kAskedAtOnce = 512;
constexpr int64_t kAskedAhead = 256 * 1024;
constexpr int kCallsAhead = 4;

// How often this process is the child of a fork: a child has none of its parent's helpers, and a helper may have held
// the mutex.
std::atomic<int> forks{0};

int numForks() {
  [[maybe_unused]] static const int is_watched = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  return forks.load(std::memory_order_relaxed);
}

void runAlone(int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  for (int64_t i = 0; i < tasks; ++i) task(argument, i);
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A call's number, how many tasks it has, and the next of them, in one word: whoever takes a task knows which call's.
struct Ticket {
  uint64_t word;
  uint64_t call() const { return word >> 32; }
  int64_t tasks() const { return static_cast<int64_t>(word >> 16 & 0xffffu); }
  int64_t next() const { return static_cast<int64_t>(word & 0xffffu); }
  bool hasTasks() const { return next() < tasks(); }
};

}  // namespace

struct SpinPool::Shared {
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int64_t> done{0};  // tasks of this call
  alignas(64) std::atomic<bool> is_taken{false};
  std::atomic<bool> ends{false};
  std::atomic<int> sleepers{0};
  std::atomic<const Reads*> expected{nullptr};
  // Of the call that runs: they stay as they are until all of its tasks are done.
  void (*task)(void*, int64_t) = nullptr;
  void* argument = nullptr;
  std::mutex mutex;
  std::condition_variable woken;
  std::vector<std::thread> helpers;
  const int made_after_forks = numForks();

  bool hasHelpers() const { return made_after_forks == forks.load(std::memory_order_relaxed); }

  Ticket now() const { return {ticket.load(std::memory_order_acquire)}; }

  void takeTasks() {
    while (now().hasTasks()) {
      const Ticket mine{ticket.fetch_add(1, std::memory_order_acq_rel)};
      if (!mine.hasTasks()) return;
      task(argument, mine.next());
      done.fetch_add(1, std::memory_order_release);
    }
  }

  void call(int64_t tasks, void (*called)(void*, int64_t), void* with) {
    task = called;
    argument = with;
    done.store(0, std::memory_order_relaxed);
    // Sequentially consistent, like `sleepers`: one of the two sees the other.
    ticket.store((now().call() + 1) << 32 | static_cast<uint64_t>(tasks) << 16);
    if (sleepers.load() > 0) wake();
    takeTasks();
    for (int turns = 0; done.load(std::memory_order_acquire) < tasks; ++turns) {
      if (turns % 4096 == 4095) std::this_thread::yield();  // a helper waits for this processor, maybe
      pause();
    }
  }

  void wake() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
    }
    woken.notify_all();
  }
};

SpinPool::SpinPool(int threads) : threads_(threads < 1 ? 1 : threads), shared_(new Shared) {
  Shared* const shared = shared_;
  try {
    for (int i = 1; i < threads_; ++i) shared->helpers.emplace_back([shared, i] { work(*shared, i); });
  } catch (const std::exception& error) {  // those that did start end here: nobody else knows of them
    const size_t started = shared->helpers.size();
    end();
    throw std::runtime_error("threads: received " + std::to_string(started + 1) + " (" + error.what() + "), expected " +
                             std::to_string(threads_));
  }
}

SpinPool::~SpinPool() {
  if (shared_->hasHelpers()) end();
}

void SpinPool::end() {
  shared_->ends = true;
  shared_->wake();
  for (std::thread& helper : shared_->helpers) helper.join();
  delete shared_;
}

bool SpinPool::tryRun(int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  Shared& shared = *shared_;
  if (!shared.hasHelpers()) {
    runAlone(tasks, task, argument);
    return true;
  }
  if (shared.is_taken.exchange(true)) return false;
  if (tasks <= kMostTasks) {
    shared.call(tasks, task, argument);
  } else {
    struct Slice {
      void (*task)(void*, int64_t);
      void* argument;
      int64_t first;
    } slice{task, argument, 0};
    for (; slice.first < tasks; slice.first += kMostTasks) {
      const int64_t left = tasks - slice.first;
      shared.call(
          left < kMostTasks ? left : kMostTasks,
          [](void* called, int64_t index) {
            const Slice& one = *static_cast<const Slice*>(called);
            one.task(one.argument, one.first + index);
          },
          &slice);
    }
  }
  shared.is_taken.store(false, std::memory_order_release);
  return true;
}

void SpinPool::run(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  if (!static_cast<SpinPool*>(pool)->tryRun(tasks, task, argument)) runAlone(tasks, task, argument);
}

void SpinPool::expect(const Reads* reads) {
  shared_->expected.store(reads, std::memory_order_release);
}

namespace {

// What one helper has asked for.
struct Asking {
  int helper;
  const Reads* reads = nullptr;
  int64_t at = 0;  // bytes of each worker's reading

  // A few lines more of what comes next. Returns false if that is enough.
  bool ask(const Reads* expected) {
    if (first != expected) {
      if (reads != expected) reads = expected, at = 0;  // else it goes on where it ended
      first = expected, asked = at, calls = 0;
    }
    if (reads == nullptr || asked >= kAskedAhead || calls >= kCallsAhead) return false;
    // The caller has other things to do between calls: its share is asked for too.
    bool is_more = reads->ask(helper, at, kAskedAtOnce);
    if (helper == 1) is_more |= reads->ask(0, at, kAskedAtOnce);
    at += kAskedAtOnce;
    if (is_more) {
      asked += kAskedAtOnce;
    } else {
      reads = reads->next(), at = 0, ++calls;
    }
    return true;
  }

  const Reads* first = nullptr;
  int64_t asked = 0;
  int calls = 0;
};

}  // namespace

void SpinPool::work(Shared& shared, int helper) {
  Asking asking{helper};
  while (!shared.ends) {
    shared.takeTasks();
    const auto start = std::chrono::steady_clock::now();
    for (int turns = 1; !shared.now().hasTasks() && !shared.ends; ++turns) {
      if (asking.ask(shared.expected.load(std::memory_order_acquire))) continue;
      pause();
      if (turns % 64 != 0 || std::chrono::steady_clock::now() - start < kSpin) continue;
      std::unique_lock<std::mutex> lock(shared.mutex);
      shared.sleepers.fetch_add(1);
      shared.woken.wait(lock, [&] { return shared.now().hasTasks() || shared.ends; });
      shared.sleepers.fetch_sub(1);
    }
  }
}

}  // namespace sinkexport::cpu
