// A table from pairs of small numbers to values, faster than the standard library's: open addressing, one array.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sinkrt {

template <typename Value>
class PairTable {
 public:
  void reserve(size_t count) {
    size_t size = 16;
    while (size < 2 * count) size *= 2;
    if (size > slots_.size()) rehash(size);
  }

  // Puts a value, over what was there.
  void put(uint32_t first, uint32_t second, const Value& value) {
    if (2 * (used_ + 1) > slots_.size()) rehash(slots_.empty() ? 16 : 2 * slots_.size());
    Slot& slot = slots_[index(key(first, second))];
    if (slot.key == kEmpty) ++used_;
    slot = {key(first, second), value};
  }

  // nullptr: there is none.
  const Value* find(uint32_t first, uint32_t second) const {
    if (slots_.empty()) return nullptr;
    const Slot& slot = slots_[index(key(first, second))];
    return slot.key == kEmpty ? nullptr : &slot.value;
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};  // no pair: numbers are below 2^32 - 1
  struct Slot {
    uint64_t key = kEmpty;
    Value value{};
  };

  static uint64_t key(uint32_t first, uint32_t second) { return uint64_t{first} << 32 | second; }

  size_t index(uint64_t wanted) const {
    uint64_t hash = wanted * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
    for (size_t at = hash & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at].key == wanted || slots_[at].key == kEmpty) return at;
    }
  }

  void rehash(size_t size) {
    std::vector<Slot> old(size);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.key != kEmpty) slots_[index(slot.key)] = slot;
    }
  }

  std::vector<Slot> slots_;  // a power of two
  size_t used_ = 0;
};

}  // namespace sinkrt
