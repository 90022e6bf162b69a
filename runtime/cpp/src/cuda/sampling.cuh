// The kernels of sampling.h. A block of fewer threads does the same, one of a single thread even on the host, where a
// test compares them with sampler.h.
#pragma once

#include "cuda/sampling.h"

#include <cfloat>

#include "sinkrt/manifest.h"
#include "sinkrt/sampler.h"

namespace sinkrt::cuda {
namespace {

#ifndef SINKRT_SAMPLING_THREADS
#define SINKRT_SAMPLING_THREADS 1024
#endif
constexpr int kThreads = SINKRT_SAMPLING_THREADS;
constexpr int kWarps = (kThreads + 31) / 32;
constexpr int kLastLane = kThreads < 32 ? kThreads - 1 : 31;
constexpr unsigned kAllLanes = 0xffffffffu;

// Weights are at most 1; sums of them are exact and in any order the same in units of 2^-40, up to 2^23 tokens.
constexpr float kMassUnit = 1099511627776.0f;
// Bits of 2^-40. Weights from there to 1 span 2^28.3 bit patterns: moved up, they fill 32 bits nearly evenly.
constexpr uint32_t kLowestWeightBits = 0x2B800000u;
constexpr int kWeightShift = 3;

__device__ uint64_t mass(float weight) {
  return static_cast<uint64_t>(weight * kMassUnit);
}
__device__ uint32_t weightKey(float weight) {
  return (__float_as_uint(weight) - kLowestWeightBits) << kWeightShift;
}
__device__ float weightOfKey(uint32_t key) {
  return __uint_as_float((key >> kWeightShift) + kLowestWeightBits);
}

// Grows with the float.
__device__ uint32_t orderedKey(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Best {
  float value;
  int32_t index;
};

// NaN counts as the largest, as it does for NumPy; of equal values the first.
__device__ bool isBetter(Best a, Best b) {
  const bool a_nan = isnan(a.value), b_nan = isnan(b.value);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

struct Shared {
  unsigned long long histogram[256];
  uint64_t warp_sums[kWarps];
  Best warp_best[kWarps];
  uint64_t above;
  uint32_t key;
  int32_t pick;
};

__device__ Best blockBest(const float* row, int size, Shared& shared) {
  Best best{-INFINITY, INT32_MAX};
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const Best other{row[i], i};
    if (isBetter(other, best)) best = other;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.index, offset)};
    if (isBetter(other, best)) best = other;
  }
  if (threadIdx.x % 32 == 0) shared.warp_best[threadIdx.x / 32] = best;
  __syncthreads();
  best = shared.warp_best[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    if (isBetter(shared.warp_best[warp], best)) best = shared.warp_best[warp];
  }
  __syncthreads();
  return best;
}

// Sum of the values of all threads before this one; *total: of all.
__device__ uint64_t blockPrefix(uint64_t value, uint64_t* total, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = value;  // of this warp's lanes up to this one
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t before = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == kLastLane) shared.warp_sums[warp] = sum;
  __syncthreads();
  uint64_t earlier = 0, all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) earlier += shared.warp_sums[i];
    all += shared.warp_sums[i];
  }
  __syncthreads();
  *total = all;
  return earlier + sum - value;
}

// Among entries with keys and measures, the key such that those above it measure less than `goal` and, with it, at
// least `goal`. 0 < goal <= the measure of all. *above: of the keys above. Entries that measure 0 do not count.
template <typename Key, typename Measure>
__device__ uint32_t select(int size, Key key_of, Measure measure_of, uint64_t goal, uint64_t* above, Shared& shared) {
  uint32_t prefix = 0;
  if (threadIdx.x == 0) shared.above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < 256; bin += kThreads) shared.histogram[bin] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t measure = measure_of(i);
      if (measure == 0) continue;
      const uint32_t key = key_of(i);
      if (shift < 24 && key >> (shift + 8) != prefix >> (shift + 8)) continue;
      atomicAdd(&shared.histogram[key >> shift & 255], static_cast<unsigned long long>(measure));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = 255;
      while (bin > 0 && shared.above + shared.histogram[bin] < goal) shared.above += shared.histogram[bin--];
      shared.key = prefix | static_cast<uint32_t>(bin) << shift;
    }
    __syncthreads();
    prefix = shared.key;
  }
  *above = shared.above;
  __syncthreads();
  return prefix;
}

// The first id, in their order, up to which the values of `value_of` sum to more than `target`, less than their sum.
template <typename Value>
__device__ int findInOrder(int size, Value value_of, uint64_t target, Shared& shared) {
  const int per_thread = (size + kThreads - 1) / kThreads;
  const int first = min(size, static_cast<int>(threadIdx.x) * per_thread), end = min(size, first + per_thread);
  uint64_t own = 0, total;
  for (int i = first; i < end; ++i) own += value_of(i);
  uint64_t sum = blockPrefix(own, &total, shared);
  if (sum <= target && target < sum + own) {
    for (int i = first; i < end; ++i) {
      sum += value_of(i);
      if (target < sum) {
        shared.pick = i;
        break;
      }
    }
  }
  __syncthreads();
  const int pick = shared.pick;
  __syncthreads();
  return pick;
}

__device__ uint64_t blockMass(const float* weights, int size, Shared& shared) {
  uint64_t own = 0, total;
  for (int i = threadIdx.x; i < size; i += kThreads) own += mass(weights[i]);
  blockPrefix(own, &total, shared);
  return total;
}

// 53 random bits of 2^53, times a total below 2^63, rounded down.
__device__ uint64_t drawnBelow(uint64_t total, uint64_t bits) {
  return mulHigh(total, bits & ~uint64_t{0x7ff});
}

// A draw from the logits of `row` (the largest is `largest`); weights go to `weights`, which may be `row` itself.
__device__ int draw(const float* row, float* weights, int size, float largest, const DeviceSampling& params,
                    int64_t position, Shared& shared) {
  const float temperature = fmaxf(params.temperature, FLT_MIN);
  const auto scaled = [&](int i) { return (row[i] - largest) / temperature; };
  uint32_t kth = 0;
  if (0 < params.top_k && params.top_k < size) {
    uint64_t above;
    kth = select(
        size, [&](int i) { return orderedKey(scaled(i)); }, [](int) { return uint64_t{1}; },
        static_cast<uint64_t>(params.top_k), &above, shared);
  }
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const float value = scaled(i);
    weights[i] = orderedKey(value) >= kth ? expf(value) : 0.0f;
  }
  __syncthreads();

  const auto mass_of = [&](int i) { return mass(weights[i]); };
  const auto key_of = [&](int i) { return weightKey(weights[i]); };
  const uint64_t total = blockMass(weights, size, shared);  // at least that of the largest, 1
  const uint64_t bits = philox(params.seed, static_cast<uint64_t>(position));
  if (params.top_p >= 1.0) return findInOrder(size, mass_of, drawnBelow(total, bits), shared);

  // The fewest largest weights that reach the goal; then the draw goes through them from the largest down.
  uint64_t goal = static_cast<uint64_t>(ceil(params.top_p * static_cast<double>(total)));
  goal = goal < 1 ? 1 : goal > total ? total : goal;
  uint64_t above;
  const uint64_t lowest = mass(weightOfKey(select(size, key_of, mass_of, goal, &above, shared)));
  const uint64_t kept = above + (goal - above + lowest - 1) / lowest * lowest;  // of equal weights as few as needed
  const uint64_t target = drawnBelow(kept, bits);
  const uint32_t key = select(size, key_of, mass_of, target + 1, &above, shared);
  const uint64_t nth = (target - above) / mass(weightOfKey(key));
  return findInOrder(
      size, [&](int i) { return uint64_t{mass(weights[i]) > 0 && weightKey(weights[i]) == key}; }, nth, shared);
}

__device__ int64_t positionOf(const SamplingArgs& args, int b) {
  if (args.wide) return static_cast<const int64_t*>(args.position)[b];
  const int32_t* parts = static_cast<const int32_t*>(args.position) + 2 * b;
  return static_cast<int64_t>(parts[0]) << 16 | parts[1];
}

__device__ void feed(const SamplingArgs& args, int b, int id) {
  if (args.wide) {
    static_cast<int64_t*>(args.ids)[b] = id;
  } else {
    static_cast<int32_t*>(args.ids)[b] = id;
  }
}

__device__ void standStill(const SamplingArgs& args, int b) {
  args.active[b] = 0;
  if (args.marks_idle) feed(args, b, static_cast<int>(kNoToken));
}

__global__ void __launch_bounds__(kThreads) sample(SamplingArgs args) {
  __shared__ Shared shared;
  const int b = blockIdx.x, size = args.vocab_size;
  if (args.ended[b]) {  // the same for all threads
    if (threadIdx.x == 0) standStill(args, b);
    return;
  }
  const DeviceSampling params = args.sampling[b];
  const float* row = args.logits + static_cast<int64_t>(b) * size;
  float* scratch = args.scratch + static_cast<int64_t>(b) * size;
  int32_t* recent = args.recent_ids + static_cast<int64_t>(b) * args.capacity;
  if (params.penalty != 1.0f) {
    for (int i = threadIdx.x; i < size; i += kThreads) scratch[i] = row[i];
    __syncthreads();
    for (int i = threadIdx.x; i < args.capacity; i += kThreads) {
      const int32_t id = recent[i];
      if (id < 0) continue;
      const float value = row[id];  // not scratch: a token seen twice is penalized once
      scratch[id] = value < 0 ? value * params.penalty : value / params.penalty;
    }
    __syncthreads();
    row = scratch;
  }
  const Best best = blockBest(row, size, shared);
  if (!isfinite(best.value)) {
    if (threadIdx.x == 0) {
      args.invalid[b] = args.ended[b] = 1;
      standStill(args, b);
    }
    return;
  }
  const int64_t position = positionOf(args, b);
  const int pick =
      params.temperature == 0.0f ? best.index : draw(row, scratch, size, best.value, params, position, shared);
  if (threadIdx.x != 0) return;
  bool ends = args.num_ids[b] >= args.history_size;
  for (int i = 0; i < *args.num_end_ids; ++i) ends = ends || args.end_ids[i] == pick;
  if (ends) {
    args.ended[b] = 1;
    standStill(args, b);
    return;
  }
  args.active[b] = 1;
  feed(args, b, pick);
  recent[position % args.capacity] = pick;
  args.history[static_cast<int64_t>(b) * args.history_size + args.num_ids[b]++] = pick;
}

__global__ void commit(SamplingArgs args) {
  const int b = blockIdx.y;
  if (!args.active[b]) return;
  const int64_t row = static_cast<int64_t>(b) * args.vocab_size;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < args.vocab_size; i += gridDim.x * blockDim.x) {
    args.logits[row + i] = args.raw_logits[row + i];
  }
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  if (args.wide) {
    ++static_cast<int64_t*>(args.position)[b];
  } else {
    const int64_t next = positionOf(args, b) + 1;
    int32_t* parts = static_cast<int32_t*>(args.position) + 2 * b;
    parts[0] = static_cast<int32_t>(next >> 16);
    parts[1] = static_cast<int32_t>(next & 0xffff);
  }
}

}  // namespace

}  // namespace sinkrt::cuda
