// What a manifest says of its states and graphs, compared with the geometry that it announces. Twin of
// runtime/sinkrt/contract/layout.py.
#pragma once

#include "sinkrt/manifest.h"

namespace sinkrt {

// Throws Error(kBundle) naming the first state or graph that disagrees.
void checkLayout(const Manifest& manifest);

}  // namespace sinkrt
