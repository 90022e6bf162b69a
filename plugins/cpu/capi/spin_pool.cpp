// The pool under calls that are counted, and what workers are said to read.
#include "spin_pool.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "interface.h"
#include "linear.h"
#include "reads.h"
#include "sink_attention.h"

using namespace sinkexport::cpu;

// `callers` threads that make `calls` calls of `tasks` tasks each on one pool, with pauses of `pause_us` between them.
// Hints name memory that is not there. Returns how many tasks did not run exactly once before their call returned.
SINKEXPORT_API int64_t sinkexport_cpu_pool_faults(int threads, int callers, int64_t calls, int64_t tasks,
                                                  int64_t pause_us) {
  Reads reads;  // longer than the pool, whose helpers look at it
  SpinPool pool(threads);
  for (int worker = 0; worker < Reads::kWorkers; ++worker) reads.set(worker, 0, reinterpret_cast<char*>(64), 1 << 20);
  reads.setNext(&reads);
  std::atomic<int64_t> faults{0};
  const auto call_all = [&] {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
    for (int64_t call = 0; call < calls; ++call) {
      for (auto& one : runs) one.store(0, std::memory_order_relaxed);
      pool.expect(call % 2 == 0 ? &reads : nullptr);
      parallelFor(pool.parallel(), tasks, [&](int64_t index) { runs[static_cast<size_t>(index)].fetch_add(1); });
      for (const auto& one : runs) faults += one.load() != 1;
      if (pause_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < callers; ++i) others.emplace_back(call_all);
  call_all();
  for (std::thread& one : others) one.join();
  return faults;
}

namespace {

template <typename Params, typename Function>
void copyReads(const Params& params, int threads, Function find, int64_t* starts, int64_t* bytes) {
  Reads reads;
  find(params, threads, reads);
  for (int worker = 0; worker < Reads::kWorkers; ++worker) {
    for (int piece = 0; piece < Reads::kPieces; ++piece) {
      const Reads::Range found = reads.of(worker, piece);
      *starts++ = reinterpret_cast<int64_t>(found.start);
      *bytes++ = found.bytes;
    }
  }
}

}  // namespace

// Addresses and bytes [kWorkers][kPieces]; 0 where there is nothing.
SINKEXPORT_API void sinkexport_cpu_linear_reads(const LinearParams* params, int threads, int64_t* starts,
                                                int64_t* bytes) {
  copyReads(*params, threads, linearReads, starts, bytes);
}
SINKEXPORT_API void sinkexport_cpu_sink_attention_reads(const SinkAttentionParams* params, int threads, int64_t* starts,
                                                        int64_t* bytes) {
  copyReads(*params, threads, sinkAttentionReads, starts, bytes);
}
