// Answers questions about ring.h, one a line on standard input, for test_kernels_build.py.
//   ring S W t        ->  slot is_sink num_sinks num_window_tokens shift
//   cached S W t j    ->  token of in-cache position j, and what inCachePosition says of that token
//   in S W t slot     ->  token in the slot, or -1
//   frequency x       ->  phaseFrequency
//   phase t f         ->  phase
#include <cstdint>
#include <iostream>
#include <string>

#include "sinkrt/ring.h"

int main() {
  for (std::string what; std::cin >> what;) {
    if (what == "frequency") {
      double inv_freq = 0;
      std::cin >> inv_freq;
      std::cout << sinkrt::phaseFrequency(inv_freq) << '\n';
      continue;
    }
    if (what == "phase") {
      int64_t t = 0;
      uint32_t frequency = 0;
      std::cin >> t >> frequency;
      std::cout << sinkrt::phase(t, frequency) << '\n';
      continue;
    }
    sinkrt::Ring ring{};
    int64_t t = 0, index = 0;
    std::cin >> ring.num_sink_tokens >> ring.window_size >> t;
    if (what == "ring") {
      std::cout << ring.slot(t) << ' ' << ring.isSink(t) << ' ' << ring.numSinks(t) << ' ' << ring.numWindowTokens(t)
                << ' ' << ring.shift(t) << '\n';
    } else if (what == "cached") {
      std::cin >> index;
      const int64_t token = ring.cachedToken(index, t);
      std::cout << token << ' ' << ring.inCachePosition(token, t) << '\n';
    } else if (what == "in") {
      std::cin >> index;
      std::cout << ring.tokenInSlot(index, t) << '\n';
    } else {
      return 1;
    }
  }
  return 0;
}
