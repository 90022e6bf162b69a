// Where each token of a stream lies in the cache. Literal twin of runtime/sinkrt/ring.py; both replay
// tests/golden/ring.json.
//
// Position t is the 0-based index of the newest token. A cache of capacity C = S + W then holds the first S tokens of
// the stream (the sinks) and the last W tokens of index >= S (StreamingLLM, arXiv:2309.17453). The newest is included.
// Sinks and window are separate tensors; a window token u lies in slot (u - S) mod W of the ring.
//
// Integers only, for host and device. Arguments are the caller's to check: S >= 0, W >= 1, 0 <= t < kPositionLimit.
#pragma once

#include <cmath>
#include <cstdint>

#include "sinkrt/constants.h"

#if defined(__CUDACC__)
#define SINKRT_HOST_DEVICE __host__ __device__
#else
#define SINKRT_HOST_DEVICE
#endif

namespace sinkrt {

// Units of a full turn in fixed-point phase.
constexpr int64_t kTurn = int64_t{1} << 32;

// Geometry of one stream's cache. All arguments and results are in tokens or slots.
struct Ring {
  int64_t num_sink_tokens;  // S
  int64_t window_size;      // W

  SINKRT_HOST_DEVICE constexpr int64_t capacity() const { return num_sink_tokens + window_size; }

  SINKRT_HOST_DEVICE constexpr bool isSink(int64_t t) const { return t < num_sink_tokens; }

  // Window slot of step t, in 0 .. W-1; the modulo floors, so that a sink has one too (graphs without branches use it).
  SINKRT_HOST_DEVICE constexpr int64_t slot(int64_t t) const { return floorMod(t - num_sink_tokens, window_size); }

  // Entries 0 .. n-1 of the sink tensors are valid at position t.
  SINKRT_HOST_DEVICE constexpr int64_t numSinks(int64_t t) const {
    return t + 1 < num_sink_tokens ? t + 1 : num_sink_tokens;
  }

  // Slots 0 .. n-1 are valid at position t. Also right at t = -1, before the first token.
  SINKRT_HOST_DEVICE constexpr int64_t numWindowTokens(int64_t t) const {
    const int64_t come = t - num_sink_tokens + 1;
    return come < 0 ? 0 : (come < window_size ? come : window_size);
  }

  // Tokens by which the query is turned back for the sinks, whose distance stops growing at t = C - 1.
  SINKRT_HOST_DEVICE constexpr int64_t shift(int64_t t) const {
    const int64_t past = t - (capacity() - 1);
    return past > 0 ? past : 0;
  }

  // Stream index of the j-th oldest cached token, which has in-cache position j < numSinks + numWindowTokens.
  SINKRT_HOST_DEVICE constexpr int64_t cachedToken(int64_t j, int64_t t) const {
    return j < numSinks(t) ? j : t + 1 - numWindowTokens(t) + (j - numSinks(t));
  }

  // Stream index of the token in a window slot (0 .. W-1) after step t, or -1 while no token was kept there.
  SINKRT_HOST_DEVICE constexpr int64_t tokenInSlot(int64_t slot_index, int64_t t) const {
    const int64_t age = floorMod(slot(t) - slot_index, window_size);  // steps since the slot was written
    return t - age >= num_sink_tokens ? t - age : -1;
  }

  // How many cached tokens are older than `token` at position t, or -1 if it is not in the cache.
  SINKRT_HOST_DEVICE constexpr int64_t inCachePosition(int64_t token, int64_t t) const {
    const int64_t oldest_in_window = t + 1 - numWindowTokens(t);
    if (0 <= token && token < numSinks(t)) return token;
    if (oldest_in_window <= token && token <= t) return numSinks(t) + token - oldest_in_window;
    return -1;
  }

  SINKRT_HOST_DEVICE static constexpr int64_t floorMod(int64_t a, int64_t b) {
    const int64_t rest = a % b;
    return rest < 0 ? rest + b : rest;
  }
};

// Fixed-point frequency of a rotary pair: turns a token in units of 2^-32. inv_freq: radians a token, finite.
inline uint32_t phaseFrequency(double inv_freq) {
  constexpr double kTwoPi = 6.283185307179586;
  const double turns = std::fmod(std::nearbyint(inv_freq / kTwoPi * static_cast<double>(kTurn)), double(kTurn));
  return static_cast<uint32_t>(static_cast<int64_t>(turns));  // a negative one wraps as Python's % does
}

// (t * frequency) mod 2^32: the exact angle of position t, in units of 2^-32 turns. Unsigned multiplication wraps at
// 2^32.
SINKRT_HOST_DEVICE constexpr uint32_t phase(int64_t t, uint32_t frequency) {
  return static_cast<uint32_t>(static_cast<uint64_t>(t)) * frequency;
}

}  // namespace sinkrt
