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

  void set(int worker, int piece, const void* start, int64_t bytes) {
    if (worker >= kWorkers) return;
    Piece& to = pieces_[worker][piece];
    to.bytes.store(bytes, std::memory_order_relaxed);
    to.start.store(static_cast<const char*>(start), std::memory_order_relaxed);
  }

  void clear() {
    for (auto& worker : pieces_) {
      for (Piece& piece : worker) piece.bytes.store(0, std::memory_order_relaxed);
    }
    setNext(nullptr);
  }
  bool isKnown() const { return pieces_[0][0].bytes.load(std::memory_order_relaxed) > 0; }

  void setNext(const Reads* next) { next_.store(next, std::memory_order_relaxed); }
  const Reads* next() const { return next_.load(std::memory_order_relaxed); }

  // Asks for lines of all pieces of a worker, `begin` .. `begin + bytes` of its reading. Returns whether there were any.
  bool ask(int worker, int64_t begin, int64_t bytes) const {
    if (worker >= kWorkers) return false;
    int64_t sizes[kPieces], total = 0;
    for (int i = 0; i < kPieces; ++i) total += sizes[i] = pieces_[worker][i].bytes.load(std::memory_order_relaxed);
    if (begin >= total) return false;
    for (int i = 0; i < kPieces; ++i) {
      const char* start = pieces_[worker][i].start.load(std::memory_order_relaxed);
      const int64_t from = begin * sizes[i] / total / kLine * kLine, limit = (begin + bytes) * sizes[i] / total;
      for (int64_t at = from; at < limit && at < sizes[i]; at += kLine) __builtin_prefetch(start + at, 0, 2);
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
