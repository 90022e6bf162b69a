// Rows that picked the same matrix are one matmul of few tokens (linear_few.cuh): each matrix that was chosen is read
// once, by 8 or 16 rows at a time, in place, and no other is. Every block sorts the picks for itself, in shared memory,
// which takes less time than a launch.
#include "expert_linear.h"

#include <algorithm>

#include "linear_few.cuh"
#include "problem.h"

namespace sinkexport {
namespace linear {
namespace {

constexpr int kMaxExperts = 512;
constexpr int kMaxPicks = 2048;

// A task of fewTokens: a tile is outputs of one matrix and up to kGroup of the rows that picked it.
template <int kGroup>
struct ChosenMatrices {
  static constexpr bool kPlansEarly = false, kIsGated = false;

  LinearParams p;  // num_rows, weight, scale: R, [E, N, K], [E, N]
  const int32_t* picks;
  int num_experts, num_picks, outputs_of_matrix;  // the last: padding included

  struct Group {
    uint16_t expert, first, num_rows;  // first: of its rows, in the plan's order
  };

  __host__ __device__ int maxTokens() const { return kGroup; }
  // Every matrix that is chosen may have a group that is not full.
  __host__ __device__ int maxGroups() const {
    const int chosen = num_picks < num_experts ? num_picks : num_experts, groups = chosen + num_picks / kGroup;
    return num_picks < groups ? num_picks : groups;
  }
  int maxTiles(int rows) const { return divideUp(p.num_outputs, rows) * maxGroups(); }
  int sharedBytes() const {
    return (1 + num_experts) * static_cast<int>(sizeof(int)) + maxGroups() * static_cast<int>(sizeof(Group)) +
           num_picks * static_cast<int>(sizeof(uint16_t));
  }

  template <int kRows>
  struct Plan {
    const ChosenMatrices& task;
    const Group* groups;
    const uint16_t* rows;  // [P], by matrix
    int num_groups, picks_of_row;

    // Rows of a group are those that every block takes for it: sorted by matrix, then as they come.
    __device__ __forceinline__ Plan(const ChosenMatrices& task_, unsigned char* memory)
        : task(task_), picks_of_row(task_.num_picks / task_.p.num_rows) {
      int* const total = reinterpret_cast<int*>(memory);
      int* const next = total + 1;  // [E], where the next row of a matrix goes
      Group* const groups_ = reinterpret_cast<Group*>(next + task.num_experts);
      uint16_t* const rows_ = reinterpret_cast<uint16_t*>(groups_ + task.maxGroups());
      if (task.num_picks <= kWarpSize) {
        if (threadIdx.x < kWarpSize) sortFew(total, groups_, rows_);
      } else {
        sortMany(total, next, groups_, rows_);
      }
      __syncthreads();
      groups = groups_, rows = rows_, num_groups = *total;
    }

    __device__ __forceinline__ int pick(int i) const { return min(max(task.picks[i], 0), task.num_experts - 1); }

    // Inclusive sums over a warp's lanes of rows and of groups, in one word: neither reaches 1 << 16.
    static __device__ __forceinline__ int sumsUpTo(int lane, int sums) {
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, sums, step);
        if (lane >= step) sums += before;
      }
      return sums;
    }

    static __device__ __forceinline__ void writeGroups(Group* at, int expert, int first, int count) {
      for (int i = 0; i * kGroup < count; ++i) {
        at[i] = {static_cast<uint16_t>(expert), static_cast<uint16_t>(first + i * kGroup),
                 static_cast<uint16_t>(min(kGroup, count - i * kGroup))};
      }
    }

    // A pick for each lane of one warp, matrices in the order in which they come.
    __device__ __forceinline__ void sortFew(int* total, Group* groups_, uint16_t* rows_) const {
      const int lane = threadIdx.x;
      const bool valid = lane < task.num_picks;
      const int expert = valid ? pick(lane) : -1;
      const unsigned same = __match_any_sync(kAllLanes, expert);
      const int rank = __popc(same & ((1u << lane) - 1)), count = __popc(same);
      const int mine = valid && rank == 0 ? count | divideUp(count, kGroup) << 16 : 0, sums = sumsUpTo(lane, mine);
      const int before = sums - mine;
      const int first = __shfl_sync(kAllLanes, before, __ffs(same) - 1) & 0xffff;
      if (valid) rows_[first + rank] = static_cast<uint16_t>(lane);
      if (mine) writeGroups(groups_ + (before >> 16), expert, first, count);
      if (lane == kWarpSize - 1) *total = sums >> 16;
    }

    // Counting sort by the block.
    __device__ __forceinline__ void sortMany(int* total, int* next, Group* groups_, uint16_t* rows_) const {
      const int num_experts = task.num_experts, num_picks = task.num_picks;
      for (int i = threadIdx.x; i < num_experts; i += blockDim.x) next[i] = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < num_picks; i += blockDim.x) atomicAdd(next + pick(i), 1);
      __syncthreads();
      if (threadIdx.x >= kWarpSize) return;
      const int lane = threadIdx.x;
      int sums_before = 0;
      for (int base = 0; base < num_experts; base += kWarpSize) {
        const int expert = base + lane, count = expert < num_experts ? next[expert] : 0;
        const int mine = count | divideUp(count, kGroup) << 16, sums = sums_before + sumsUpTo(lane, mine);
        const int before = sums - mine, first = before & 0xffff;
        writeGroups(groups_ + (before >> 16), expert, first, count);
        if (expert < num_experts) next[expert] = first;
        sums_before = __shfl_sync(kAllLanes, sums, kWarpSize - 1);
      }
      if (lane == 0) *total = sums_before >> 16;
      __syncwarp();
      for (int base = 0; base < num_picks; base += kWarpSize) {
        const int row = base + lane;
        const bool valid = row < num_picks;
        const int expert = valid ? pick(row) : -1;
        const unsigned same = __match_any_sync(kAllLanes, expert);
        const int rank = __popc(same & ((1u << lane) - 1)), first = valid ? next[expert] : 0;
        __syncwarp();
        if (valid) rows_[first + rank] = static_cast<uint16_t>(row);
        if (valid && rank == 0) next[expert] = first + __popc(same);
        __syncwarp();
      }
    }

    __device__ __forceinline__ int numTiles() const { return divideUp(task.p.num_outputs, kRows) * num_groups; }
    using Place = FewTile;
    // Groups of one matrix stand side by side, so that blocks that run together read the same weights.
    __device__ __forceinline__ Place place(int index) const {
      if (index >= numTiles()) return {};
      const Group group = groups[index % num_groups];
      return {index / num_groups * kRows, group.num_rows, group.first,
              static_cast<size_t>(group.expert) * task.outputs_of_matrix};
    }
    __device__ __forceinline__ FewTile tile(const Place& place) const { return place; }
    __device__ __forceinline__ int inputRow(const FewTile& tile, int token) const {
      return rows[tile.first_token + token] / picks_of_row;
    }
    __device__ __forceinline__ int outputRow(const FewTile& tile, int token) const {
      return rows[tile.first_token + token];
    }
  };
};

// Of INT4 weights a whole line would have four times its bytes of a group's tokens.
template <typename Weight>
constexpr int kExpertLine = kIsInt4<Weight> ? kLineBytes / 2 : kLineBytes;

template <typename Weight, typename Half, int kGroup, int kStages>
cudaError_t launchGroups(const ChosenMatrices<kGroup>& task, const Device& device, cudaStream_t stream) {
  constexpr int kTokenTiles = kGroup / 8, kTall = 2, kTallWarps = 4, kTallStages = 3, kLine = kExpertLine<Weight>;
  // Taller tiles read the tokens less often and add up less often, shorter ones spread better: outputs that the block
  // with the most of them has, counted for two blocks on each multiprocessor.
  const auto outputs = [&](int rows) { return divideUp(task.maxTiles(rows), 2 * device.multiprocessors) * rows; };
  const int tall_bytes = fewSharedBytes<Weight, kLine>(kTall, kGroup, kTallWarps, kTallStages) + task.sharedBytes();
  if (tall_bytes <= device.shared_bytes && 5 * outputs(16 * kTall) <= 6 * outputs(16)) {
    return launchFew<Weight, Half, kTall, kTokenTiles, kTallWarps, kTallStages, kLine>(task, device, stream);
  }
  return launchFew<Weight, Half, 1, kTokenTiles, 8, kStages, kLine>(task, device, stream);
}

template <typename Weight, typename Half>
cudaError_t launchTyped(const ExpertLinearParams& params, const Device& device, cudaStream_t stream) {
  LinearParams p;
  p.num_rows = params.num_rows, p.num_inputs = params.num_inputs, p.num_outputs = params.num_outputs;
  p.dtype = params.dtype, p.weight_type = params.weight_type;
  p.x = params.x, p.weight = params.weight, p.scale = params.scale, p.y = params.y;
  p.block_size = params.block_size, p.block_scale = params.block_scale, p.zero_points = params.zero_points;
  const int outputs = kIsInt4<Weight> ? Int4Sizes(p).num_tiles * kInt4TileOutputs : p.num_outputs;
  constexpr int kFew = 8, kMore = 16, kMoreStages = kIsHalf<Weight> ? 3 : 2;
  const ChosenMatrices<kMore> more{p, params.picks, params.num_experts, params.num_picks, outputs};
  // Fuller groups read a matrix less often. Where most would not be full, and where shared memory is short, smaller
  // ones.
  const bool fits =
      fewSharedBytes<Weight, kExpertLine<Weight>>(1, kMore, 4, kMoreStages) + more.sharedBytes() <= device.shared_bytes;
  if (fits && params.num_picks >= kFew / 2 * std::min(params.num_experts, params.num_picks)) {
    return launchGroups<Weight, Half, kMore, kMoreStages>(more, device, stream);
  }
  const ChosenMatrices<kFew> few{p, params.picks, params.num_experts, params.num_picks, outputs};
  return launchGroups<Weight, Half, kFew, 3>(few, device, stream);
}

template <typename Half>
cudaError_t launchTyped(const ExpertLinearParams& params, const Device& device, cudaStream_t stream) {
  return withWeight<Half>(params.weight_type,
                          [&](auto weight) { return launchTyped<decltype(weight), Half>(params, device, stream); });
}

}  // namespace
}  // namespace linear

using namespace linear;

const char* expertLinearProblem(const ExpertLinearParams& p) {
  if (p.num_experts < 1 || p.num_experts > kMaxExperts) {
    return explain("num_experts: received %d, expected 1 .. %d", p.num_experts, kMaxExperts);
  }
  if (p.num_picks < 1 || p.num_picks > kMaxPicks) {
    return explain("num_picks: received %d, expected 1 .. %d", p.num_picks, kMaxPicks);
  }
  if (p.num_rows < 1 || p.num_picks % p.num_rows) {
    return explain("num_rows: received %d, expected a divisor of num_picks, %d", p.num_rows, p.num_picks);
  }
  if (const char* problem = weightProblem(p)) return problem;
  if (const char* problem = dtypeProblem(p.dtype)) return problem;
  const size_t picks = p.num_picks, rows = p.num_rows, inputs = p.num_inputs;
  const WeightBytes bytes = weightBytes(p, p.num_experts);
  return outputProblem({"y", p.y, picks * p.num_outputs * 2},
                       {{"picks", p.picks, picks * sizeof(int32_t)},
                        {"x", p.x, rows * inputs * 2},
                        {"weight", p.weight, bytes.weight},
                        {"scale", p.scale, bytes.scale, !bytes.scale},
                        {"block_scale", p.block_scale, bytes.block_scale, !bytes.block_scale},
                        {"zero_points", p.zero_points, bytes.zero_points, true}});
}

cudaError_t launchExpertLinear(const ExpertLinearParams& params, cudaStream_t stream) {
  if (expertLinearProblem(params)) return cudaErrorInvalidValue;
  Device device;
  const cudaError_t error = describeDevice(device);
  if (error != cudaSuccess) return error;
  return params.dtype == DType::kFloat16 ? launchTyped<__half>(params, device, stream)
                                         : launchTyped<__nv_bfloat16>(params, device, stream);
}

}  // namespace sinkexport
