// What a manifest says of its states and graphs, compared with the geometry that it announces. Twin of
// runtime/sinkrt/layout.py.
#pragma once

#include "sinkrt/manifest.h"

namespace sinkrt {

constexpr size_t kMaxRank = 8;                         // axes of a tensor
constexpr int64_t kMaxTensorBytes = int64_t{1} << 46;  // more than any address space of a process holds

// Throws Error(kBundle) naming the first state or graph that disagrees.
void checkLayout(const Manifest& manifest);

}  // namespace sinkrt
