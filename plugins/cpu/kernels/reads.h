// What a call of a kernel reads, for threads that wait for it: they ask for the first of it while the memory would
// stand idle.
#pragma once

#include <atomic>
#include <cstdint>

namespace sinkexport::cpu {

// Pieces of memory that each worker of a call reads, in the order in which it does, and the call that follows. Hints
// only: what is out of date costs time and nothing else. All of it may change while others look.
class Reads {
 public:
  static constexpr int kWorkers = 16;  // those beyond have no hints
  static constexpr int kPieces = 3;    // that a worker reads side by side

  struct Range {
    const char* start;
    int64_t bytes;
  };

  void set(int worker, int piece, const void* start, int64_t bytes) {
    if (worker >= kWorkers) return;
    pieces_[worker][piece].bytes.store(bytes, std::memory_order_relaxed);
    pieces_[worker][piece].start.store(static_cast<const char*>(start), std::memory_order_relaxed);
  }
  Range of(int worker, int piece) const {
    const Piece& found = pieces_[worker][piece];
    return {found.start.load(std::memory_order_relaxed), found.bytes.load(std::memory_order_relaxed)};
  }
  bool isKnown() const { return of(0, 0).bytes > 0; }

  void setNext(const Reads* next) { next_.store(next, std::memory_order_release); }
  const Reads* next() const { return next_.load(std::memory_order_acquire); }

  void clear() {
    for (int worker = 0; worker < kWorkers; ++worker) {
      for (int piece = 0; piece < kPieces; ++piece) set(worker, piece, nullptr, 0);
    }
    setNext(nullptr);
  }

  // Asks for lines of all pieces of a worker, from `begin` on of its reading. Returns false at the reading's end.
  bool ask(int worker, int64_t begin, int64_t bytes) const {
    if (worker >= kWorkers) return false;
    Range ranges[kPieces];
    int64_t total = 0;
    for (int i = 0; i < kPieces; ++i) {
      ranges[i] = of(worker, i);
      total += ranges[i].bytes;
    }
    if (begin >= total) return false;
    for (const Range& one : ranges) {
      const int64_t limit = (begin + bytes) * one.bytes / total;
      for (int64_t at = begin * one.bytes / total / kLine * kLine; at < limit && at < one.bytes; at += kLine) {
        __builtin_prefetch(one.start + at, 0, 2);  // to the second-level cache
      }
    }
    return true;
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Piece {
    std::atomic<const char*> start{nullptr};
    std::atomic<int64_t> bytes{0};
  };
  Piece pieces_[kWorkers][kPieces];
  std::atomic<const Reads*> next_{nullptr};
};

}  // namespace sinkexport::cpu
