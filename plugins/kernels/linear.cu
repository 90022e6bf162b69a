// y = x . W^T * scale + bias with W in INT8, y = x . W^T + bias with W of x's type (linear.h says which shapes).
//
// Both kernels multiply on the tensor cores, weights as the left factor (16 outputs a tile) and tokens as the right one
// (8 a tile): even for one token that takes fewer instructions a weight than multiplying and adding one by one, so that
// reading the weights is what is left. A sum over k has no order of its own, so lanes take 16 consecutive weights of a
// row (one 16-byte load) as their share of four k16 tiles, and the same k of the tokens: in tile s lane t of four has
// k = 16 t + 4 s .. + 3 of each 64. Of half weights a load is 8, of two tiles: k = 8 t + 4 s .. + 3 of each 32 (more
// tokens: two loads, and k as with INT8).
//
// - Up to 16 tokens: a block takes tiles of 16 or 32 outputs and its warps split k among them, each with a ring of
//   chunks of its own in shared memory, filled by asynchronous copies; the warps' sums are added at the end of a tile,
//   in order. Weights are read once. No second launch, no workspace: a few blocks with so much on its way fill the
//   memory's queue.
// - More tokens: blocks of 64 or 128 outputs x 32, 64 or 128 tokens, with four warps side by side along the outputs, so
//   that a weight is converted once in a block (twice in the largest). Where the tiles are fewer than the
//   multiprocessors, k is split over blocks too: float32 partial sums in the workspace, added in order by a second
//   kernel. The split depends on shapes alone, so that the workspace does not depend on the device.
#include "linear.h"

#include <algorithm>

#include "linear.cuh"
#include "problem.h"

namespace sinkexport {
namespace linear {
namespace {

constexpr int kFewTokens = 16;
constexpr int kMaxTokens = 1 << 16;
constexpr int kMaxFeatures = 1 << 21;

__host__ __device__ constexpr int divideUp(int a, int b) { return (a + b - 1) / b; }

// What makes an output of a sum.
template <typename Weight, typename Half>
struct Output {
  float scale, bias;
  __device__ __forceinline__ Output(const LinearParams& p, int output)
      : scale(kIsInt8<Weight> ? p.scale[output] : 1.0f),
        bias(p.bias ? toFloat(static_cast<const Half*>(p.bias)[output]) : 0.0f) {}
  __device__ __forceinline__ Half operator()(float sum) const {
    return fromFloat<Half>(kIsInt8<Weight> ? fmaf(sum, scale, bias) : sum + bias);
  }
};

// --- up to 16 tokens ---

constexpr int kLineBytes = 128;  // of each weight row in a warp's step

template <typename Weight>
constexpr int kFewChunk = kLineBytes / static_cast<int>(sizeof(Weight));  // k of a step

template <typename Weight>
__host__ __device__ constexpr int fewStageBytes(int row_tiles, int num_tokens) {
  return 16 * row_tiles * kLineBytes + num_tokens * kFewChunk<Weight> * 2;
}

template <typename Weight>
__host__ __device__ constexpr int fewSharedBytes(int row_tiles, int num_tokens, int warps, int stages) {
  const int sum_bytes = 16 * row_tiles * num_tokens * static_cast<int>(sizeof(float));
  return warps * (stages * fewStageBytes<Weight>(row_tiles, num_tokens) + 2 * sum_bytes);
}

// Each block takes every gridDim.x-th tile of outputs; chunks of k go round its warps. To a warp all that is one
// sequence of steps, so that its copies for a tile are on their way while the one before it is finished.
template <typename Weight, typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps* kWarpSize) fewTokens(const LinearParams p) {
  constexpr int kChunk = kFewChunk<Weight>;
  constexpr int kRows = 16 * kRowTiles;       // outputs of a tile
  constexpr int kTokenBytes = 2 * kChunk;     // of one token in a stage
  constexpr int kPieces = kTokenBytes / 16;   // the same in units of a copy
  constexpr int kWeightBytes = kRows * kLineBytes;
  constexpr int kUnit = kUnitWeights<Weight>;
  constexpr int kUnitPieces = kUnit / 8;      // of a token, beside one unit of weights
  constexpr int kOddPieces = kPieces > 8 ? 1 : 4;  // by which pieces of odd tokens trade places
  extern __shared__ __align__(16) unsigned char shared[];
  const int num_tokens = p.num_rows, num_inputs = p.num_inputs, num_outputs = p.num_outputs;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int stage_bytes = fewStageBytes<Weight>(kRowTiles, num_tokens);
  unsigned char* const ring = shared + warp * kStages * stage_bytes;
  float* const all_sums = reinterpret_cast<float*>(shared + kWarps * kStages * stage_bytes);
  const int num_tiles = divideUp(num_outputs, kRows), num_chunks = divideUp(num_inputs, kChunk);
  const int num_steps = num_chunks > warp ? divideUp(num_chunks - warp, kWarps) : 0;  // of this warp in a tile
  const Weight* const weight = static_cast<const Weight*>(p.weight);
  const Half* const x = static_cast<const Half*>(p.x);

  const auto copyWeights = [&](unsigned char* stage, int first_row, int first_k) {
    const int row = lane / 8, unit = lane % 8;  // then 4 rows on, and so on
    // 16-byte units of odd rows trade places, so that lanes of two rows read from all banks.
    unsigned char* const to = stage + row * kLineBytes + (unit ^ (row & 1) << 2) * 16;
    const size_t offset = static_cast<size_t>(first_row + row) * num_inputs + first_k + unit * kUnit;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const bool valid = first_row + row + 4 * i < num_outputs && first_k + unit * kUnit < num_inputs;
      const Weight* const from = weight + (valid ? offset + static_cast<size_t>(4 * i) * num_inputs : 0);
      copyAsync(to + 4 * i * kLineBytes, from, valid ? 16 : 0);
    }
  };
  const auto placeOfPiece = [&](unsigned char* stage, int i) -> unsigned char* {  // of odd tokens likewise
    const int token = i / kPieces, piece = i % kPieces;
    return stage + kWeightBytes + token * kTokenBytes + (piece ^ (token & 1) * kOddPieces) * 16;
  };
  int copy_tile = blockIdx.x, copy_step = 0, copy_stage = 0;  // what is copied next, and where to
  const auto advanceCopy = [&] {
    commitCopies();
    if (++copy_step >= num_steps) copy_step = 0, copy_tile += gridDim.x;
    if (++copy_stage == kStages) copy_stage = 0;
  };
  const auto copyNext = [&] {
    if (copy_tile < num_tiles) {
      unsigned char* const stage = ring + copy_stage * stage_bytes;
      const int first_k = (warp + copy_step * kWarps) * kChunk;
      for (int i = lane; i < num_tokens * kPieces; i += kWarpSize) {
        const int k = first_k + i % kPieces * 8;
        const bool valid = k < num_inputs;
        const Half* const from = x + (valid ? static_cast<size_t>(i / kPieces) * num_inputs + k : 0);
        copyAsync(placeOfPiece(stage, i), from, valid ? 16 : 0);
      }
      copyWeights(stage, copy_tile * kRows, first_k);
    }
    advanceCopy();
  };

  // The first stage's weights may be allowed to be read early. Not more of them: its tokens would queue behind.
  allowNextKernel();
  if (!p.constant_weight) waitForEarlierKernels();
  copyWeights(ring, copy_tile * kRows, warp * kChunk);
  advanceCopy();
  if (p.constant_weight) waitForEarlierKernels();
  uint4 pieces[kPieces * 8 * kTokenTiles / kWarpSize];
  constexpr int kNumPieces = sizeof pieces / sizeof *pieces;
#pragma unroll
  for (int j = 0; j < kNumPieces; ++j) {
    const int i = lane + j * kWarpSize, k = warp * kChunk + i % kPieces * 8;
    pieces[j] = i < num_tokens * kPieces && k < num_inputs
                    ? *reinterpret_cast<const uint4*>(x + static_cast<size_t>(i / kPieces) * num_inputs + k)
                    : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 1; i < kStages - 1; ++i) copyNext();
#pragma unroll
  for (int j = 0; j < kNumPieces; ++j) {
    const int i = lane + j * kWarpSize;
    if (i < num_tokens * kPieces) *reinterpret_cast<uint4*>(placeOfPiece(ring, i)) = pieces[j];
  }

  int read_stage = 0, turn = 0;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    float sum[kRowTiles][kTokenTiles][4] = {};
    for (int step = 0; step < num_steps; ++step) {
      waitCopies<kStages - 2>();
      __syncwarp();
      copyNext();  // into the stage that all lanes have read in the step before
      const unsigned char* const stage = ring + read_stage * stage_bytes;
      const unsigned char* const tokens = stage + kWeightBytes;
      if (++read_stage == kStages) read_stage = 0;
#pragma unroll
      for (int part = 0; part < 2; ++part) {  // half of the k
        uint4 b[kTokenTiles][kUnitPieces];
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int token = 8 * j + g;
#pragma unroll
          for (int i = 0; i < kUnitPieces; ++i) {
            const int piece = ((part * 4 + t) * kUnitPieces + i) ^ (token & 1) * kOddPieces;
            b[j][i] = token < num_tokens ? *reinterpret_cast<const uint4*>(tokens + token * kTokenBytes + piece * 16)
                                         : uint4{0, 0, 0, 0};
          }
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const unsigned char* const rows = stage + (16 * r + g) * kLineBytes + ((part * 4 + t) ^ (g & 1) << 2) * 16;
          const uint4 near = *reinterpret_cast<const uint4*>(rows);
          const uint4 far = *reinterpret_cast<const uint4*>(rows + 8 * kLineBytes);
#pragma unroll
          for (int s = 0; s < kUnit / 4; ++s) {
            uint32_t a[4];
            takeTile<Weight, Half>(a, near, far, s);
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
              const uint4 piece = b[j][s / 2];
              multiply<Half>(sum[r][j], a, s % 2 ? piece.z : piece.x, s % 2 ? piece.w : piece.y);
            }
          }
        }
      }
    }

    // Sums of all warps as [kWarps, tokens, kRows], in two places by turns: who writes one has passed the barrier after
    // the other was written, and so has everyone who reads from it.
    float* const sums = all_sums + turn * kWarps * num_tokens * kRows;
    turn ^= 1;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * j + 2 * t + i % 2;
          if (token < num_tokens) sums[(warp * num_tokens + token) * kRows + 16 * r + g + i / 2 * 8] = sum[r][j][i];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens * kRows; i += kWarps * kWarpSize) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w * num_tokens * kRows + i];
      const int token = i / kRows, output = tile * kRows + i % kRows;
      if (output >= num_outputs) continue;
      static_cast<Half*>(p.y)[static_cast<size_t>(token) * num_outputs + output] = Output<Weight, Half>(p, output)(total);
    }
  }
}

// --- more tokens ---

constexpr int kRowWarps = 4;    // side by side along the outputs
constexpr int kManyChunk = 64;  // k of a step

// Tiles of a warp, and warps side by side along the tokens.
template <int kRowTiles_, int kTokenTiles_, int kTokenWarps_, int kStages_>
struct ManyShape {
  static constexpr int kRowTiles = kRowTiles_, kTokenTiles = kTokenTiles_, kTokenWarps = kTokenWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = kRowWarps * kTokenWarps * kWarpSize;
  static constexpr int kRows = kRowWarps * 16 * kRowTiles, kTokens = kTokenWarps * 8 * kTokenTiles;
  template <typename Weight>
  static constexpr int kStageBytes = (kRows * static_cast<int>(sizeof(Weight)) + kTokens * 2) * kManyChunk;
};

// Grid: token tiles, output tiles, splits of k. `partial` [splits, M, N], or null if there is one split.
template <typename Weight, typename Half, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kTokenWarps > 1 ? 2 : 1)
    manyTokens(const LinearParams p, float* __restrict__ partial, int chunks_per_split) {
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kTokens = Shape::kTokens;
  constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles;
  constexpr int kStages = Shape::kStages, kStageBytes = Shape::template kStageBytes<Weight>;
  constexpr int kRowBytes = kManyChunk * static_cast<int>(sizeof(Weight));  // of weights in a stage
  constexpr int kOddPieces = kIsInt8<Weight> ? 0 : 1;  // by which pieces of odd rows trade places, as tokens' do
  constexpr int kPairsAtOnce = Shape::kTokenWarps > 1 ? 1 : 2;  // two would spill where 128 registers are all there is
  extern __shared__ __align__(16) unsigned char shared[];
  const int num_tokens = p.num_rows, num_inputs = p.num_inputs, num_outputs = p.num_outputs;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int row_of_warp = threadIdx.x / kWarpSize % kRowWarps * 16 * kRowTiles;
  const int token_of_warp = threadIdx.x / kWarpSize / kRowWarps * 8 * kTokenTiles;
  const int first_token = blockIdx.x * kTokens, first_row = blockIdx.y * kRows;
  const int first_chunk = blockIdx.z * chunks_per_split;
  const int num_steps = min(divideUp(num_inputs, kManyChunk) - first_chunk, chunks_per_split);

  waitForEarlierKernels();

  // Past the last output or token the last one is read again; sums of those are not stored.
  const Weight* const weight = static_cast<const Weight*>(p.weight) + static_cast<size_t>(first_row) * num_inputs;
  const Half* const x = static_cast<const Half*>(p.x) + static_cast<size_t>(first_token) * num_inputs;
  const int last_row = num_outputs - 1 - first_row, last_token = num_tokens - 1 - first_token;
  const auto copyStep = [&](int step) {
    if (step < num_steps) {
      unsigned char* const stage = shared + step % kStages * kStageBytes;
      const int first_k = (first_chunk + step) * kManyChunk;
      {
        constexpr int kUnit = kUnitWeights<Weight>, kPieces = kManyChunk / kUnit;
        const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, k = first_k + piece * kUnit;
        const int size = k < num_inputs ? 16 : 0;
        unsigned char* const to = stage + (row * kPieces + (piece ^ (row & 1) * kOddPieces)) * 16;
#pragma unroll
        for (int i = 0; i < kRows; i += kThreads / kPieces) {
          copyAsync(to + i * kRowBytes, weight + (size ? min(row + i, last_row) * num_inputs + k : 0), size);
        }
      }
      {
        constexpr int kPieces = kManyChunk / 8;
        const int token = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, k = first_k + piece * 8;
        const int size = k < num_inputs ? 16 : 0;
        // 16-byte pieces of odd tokens trade places, so that lanes of two tokens read from all banks.
        unsigned char* const to = stage + kRows * kRowBytes + (token * kPieces + (piece ^ (token & 1))) * 16;
#pragma unroll
        for (int i = 0; i < kTokens; i += kThreads / kPieces) {
          copyAsync(to + i * kManyChunk * 2, x + (size ? min(token + i, last_token) * num_inputs + k : 0), size);
        }
      }
    }
    commitCopies();
  };

  float sum[kRowTiles][kTokenTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copyStep(step);
  for (int step = 0; step < num_steps; ++step) {
    waitCopies<kStages - 2>();
    __syncthreads();
    copyStep(step + kStages - 1);  // into the stage that all threads have read in the step before
    const unsigned char* const stage = shared + step % kStages * kStageBytes;
    const unsigned char* const tokens = stage + kRows * kRowBytes;
#pragma unroll(kPairsAtOnce)
    for (int pair = 0; pair < 2; ++pair) {  // two k16 tiles, whose share of a token is one 16-byte piece
      uint32_t a[kRowTiles][2][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        using Words = std::conditional_t<kIsInt8<Weight>, uint2, uint4>;
        constexpr int kBytes = sizeof(Words);  // of 8 weights
        const unsigned char* const rows = stage + (row_of_warp + 16 * r + g) * kRowBytes + t * 2 * kBytes +
                                          (pair ^ (g & 1) * kOddPieces) * kBytes;
        const Words near = *reinterpret_cast<const Words*>(rows);
        const Words far = *reinterpret_cast<const Words*>(rows + 8 * kRowBytes);
        takeTile<Weight, Half>(a[r][0], near, far, 0);
        takeTile<Weight, Half>(a[r][1], near, far, 1);
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = token_of_warp + 8 * j + g;
        const uint4 b = *reinterpret_cast<const uint4*>(tokens + (token * 8 + ((t * 2 + pair) ^ (token & 1))) * 16);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply<Half>(sum[r][j], a[r][0], b.x, b.y);
          multiply<Half>(sum[r][j], a[r][1], b.z, b.w);
        }
      }
    }
  }
  waitCopies<0>();

  allowNextKernel();  // not before: the next one's blocks would crowd where there is room now
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int output = first_row + row_of_warp + 16 * r + g + i * 8;
      if (output >= num_outputs) continue;
      const Output<Weight, Half> finish(p, output);
#pragma unroll
      for (int j = 0; j < 2 * kTokenTiles; ++j) {
        const int token = first_token + token_of_warp + j / 2 * 8 + 2 * t + j % 2;
        if (token >= num_tokens) continue;
        const float total = sum[r][j / 2][2 * i + j % 2];
        if (partial) {
          partial[(static_cast<size_t>(blockIdx.z) * num_tokens + token) * num_outputs + output] = total;
        } else {
          static_cast<Half*>(p.y)[static_cast<size_t>(token) * num_outputs + output] = finish(total);
        }
      }
    }
  }
}

constexpr int kSumThreads = 256;

// y from `partial` [num_splits, M, N], added in order.
template <typename Weight, typename Half>
__global__ void __launch_bounds__(kSumThreads)
    sumSplits(const LinearParams p, const float* __restrict__ partial, int num_splits) {
  waitForEarlierKernels();
  const size_t count = static_cast<size_t>(p.num_rows) * p.num_outputs;
  const size_t i = static_cast<size_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  float total = 0.0f;
#pragma unroll 4
  for (int s = 0; s < num_splits; ++s) total += partial[s * count + i];
  static_cast<Half*>(p.y)[i] = Output<Weight, Half>(p, static_cast<int>(i % p.num_outputs))(total);
}

// --- launches ---

struct Device {
  bool overlaps = false;  // a kernel can be placed before the one that it waits for has ended
  int multiprocessors = 0;
  int shared_bytes = 0;         // that a block can have
  int shared_bytes_of_all = 0;  // that all blocks on a multiprocessor have
};

constexpr int kReservedSharedBytes = 1024;  // of each block, by the system

cudaError_t describeDevice(Device& device) {
  int index = 0, major = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes_of_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  }
  device.overlaps = major >= 9;
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, const Device& device,
                   cudaStream_t stream, Arguments... arguments) {
  constexpr int kFreeSharedBytes = 48 << 10;  // more must be asked for
  if (shared_bytes > kFreeSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return launchOverlapping(kernel, grid, dim3(threads), shared_bytes, device.overlaps, stream, arguments...);
}

template <typename Weight, typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages>
cudaError_t launchFew(const LinearParams& p, const Device& device, cudaStream_t stream) {
  const int needed_bytes = fewSharedBytes<Weight>(kRowTiles, p.num_rows, kWarps, kStages);
  if constexpr (kWarps > 4) {
    if (needed_bytes > device.shared_bytes) {
      return launchFew<Weight, Half, kRowTiles, kTokenTiles, 4, kStages>(p, device, stream);
    }
  }
  // Two blocks on a multiprocessor, each with half of the memory even if it needs less: blocks of the next launch then
  // take the places of this one's as they end. With more room they would crowd where there is most of it.
  constexpr int kBlocks = 2;
  const int share = device.shared_bytes_of_all / kBlocks - kReservedSharedBytes;
  const int shared_bytes = std::max(needed_bytes, std::min(share, device.shared_bytes));
  const int blocks = device.multiprocessors * (needed_bytes <= share ? kBlocks : 1);
  const dim3 grid(std::min(divideUp(p.num_outputs, 16 * kRowTiles), blocks));
  return launch(fewTokens<Weight, Half, kRowTiles, kTokenTiles, kWarps, kStages>, grid, kWarps * kWarpSize,
                shared_bytes, device, stream, p);
}

// How many tiles and splits of k a product of more than 16 tokens has; of shapes alone.
struct ManyPlan {
  dim3 grid;
  int chunks_per_split;
};

template <typename Shape>
ManyPlan planMany(const LinearParams& p, int wanted_blocks) {
  constexpr int kLeastChunks = 8;  // of a split, for its first copies not to be all of it
  ManyPlan plan{dim3(divideUp(p.num_rows, Shape::kTokens), divideUp(p.num_outputs, Shape::kRows)), 0};
  const int num_chunks = divideUp(p.num_inputs, kManyChunk);
  const int tiles = plan.grid.x * plan.grid.y;
  const int splits = std::max(1, std::min(wanted_blocks / tiles, num_chunks / kLeastChunks));
  plan.chunks_per_split = divideUp(num_chunks, splits);
  plan.grid.z = divideUp(num_chunks, plan.chunks_per_split);
  return plan;
}

template <typename Weight, typename Half, typename Shape>
cudaError_t launchMany(const LinearParams& p, const ManyPlan& plan, void* workspace, const Device& device,
                       cudaStream_t stream) {
  float* const partial = plan.grid.z > 1 ? static_cast<float*>(workspace) : nullptr;
  const cudaError_t error = launch(manyTokens<Weight, Half, Shape>, plan.grid, Shape::kThreads,
                                   Shape::kStages * Shape::template kStageBytes<Weight>, device, stream, p, partial,
                                   plan.chunks_per_split);
  if (error != cudaSuccess || !partial) return error;
  const size_t count = static_cast<size_t>(p.num_rows) * p.num_outputs;
  const dim3 grid(static_cast<unsigned>((count + kSumThreads - 1) / kSumThreads));
  return launch(sumSplits<Weight, Half>, grid, kSumThreads, 0, device, stream, p, partial, static_cast<int>(plan.grid.z));
}

using Low = ManyShape<1, 4, 1, 4>;   // 64 outputs x 32 tokens
using Wide = ManyShape<2, 8, 1, 4>;  // 128 x 64
using Tall = ManyShape<2, 8, 2, 3>;  // 128 x 128

// Calls use(shape, plan) for the shape of tiles that a product of more than 16 tokens takes: the largest that makes
// enough blocks.
template <typename Use>
auto withManyShape(const LinearParams& p, Use use) {
  constexpr unsigned kWantedBlocks = 264, kEnoughBlocks = 192;
  const auto blocks = [](const ManyPlan& plan) { return plan.grid.x * plan.grid.y * plan.grid.z; };
  const ManyPlan tall = planMany<Tall>(p, kWantedBlocks), wide = planMany<Wide>(p, kWantedBlocks);
  if (p.num_rows > Wide::kTokens && blocks(tall) >= kEnoughBlocks) return use(Tall{}, tall);
  if (p.num_rows > Low::kTokens && blocks(wide) >= kEnoughBlocks) return use(Wide{}, wide);
  return use(Low{}, planMany<Low>(p, 2 * kWantedBlocks));
}

template <typename Weight, typename Half>
cudaError_t launchTyped(const LinearParams& p, void* workspace, const Device& device, cudaStream_t stream) {
  if (p.num_rows <= 8) return launchFew<Weight, Half, 1, 1, 8, 3>(p, device, stream);
  if (p.num_rows <= kFewTokens) {
    // Taller tiles read the tokens less often, shorter ones spread better.
    constexpr int kManyOutputs = 1 << 15;
    if (p.num_outputs >= kManyOutputs && fewSharedBytes<Weight>(2, p.num_rows, 4, 3) <= device.shared_bytes) {
      return launchFew<Weight, Half, 2, 2, 4, 3>(p, device, stream);
    }
    constexpr int kStages = kIsInt8<Weight> ? 2 : 3;  // in the same memory: half as many k have half the tokens' bytes
    return launchFew<Weight, Half, 1, 2, 8, kStages>(p, device, stream);
  }
  return withManyShape(p, [&](auto shape, const ManyPlan& plan) {
    return launchMany<Weight, Half, decltype(shape)>(p, plan, workspace, device, stream);
  });
}

template <typename Half>
cudaError_t launchTyped(const LinearParams& p, void* workspace, const Device& device, cudaStream_t stream) {
  return p.weight_type == WeightType::kInt8 ? launchTyped<int8_t, Half>(p, workspace, device, stream)
                                            : launchTyped<Half, Half>(p, workspace, device, stream);
}

// --- checks ---

struct Range {
  const char* name;
  const void* data;
  size_t bytes;
  bool optional = false;
  size_t address() const { return reinterpret_cast<size_t>(data); }
};

}  // namespace
}  // namespace linear

using namespace linear;

size_t linearWorkspaceBytes(const LinearParams& params) {
  if (params.num_rows <= kFewTokens || params.num_inputs < 1 || params.num_outputs < 1) return 0;
  return withManyShape(params, [&](auto, const ManyPlan& plan) {
    return plan.grid.z > 1 ? sizeof(float) * plan.grid.z * params.num_rows * params.num_outputs : size_t{0};
  });
}

const char* linearProblem(const LinearParams& p) {
  if (p.num_rows < 1 || p.num_rows > kMaxTokens) {
    return explain("num_rows: received %d, expected 1 .. %d", p.num_rows, kMaxTokens);
  }
  if (p.weight_type != WeightType::kInt8 && p.weight_type != WeightType::kHalf) {
    return explain("weight_type: received %d, expected 0 (int8) or 1 (half)", static_cast<int>(p.weight_type));
  }
  const bool is_int8 = p.weight_type == WeightType::kInt8;
  const int unit = is_int8 ? kUnitWeights<int8_t> : kUnitWeights<__half>;
  if (p.num_inputs < unit || p.num_inputs > kMaxFeatures || p.num_inputs % unit) {
    return explain("num_inputs: received %d, expected a multiple of %d in %d .. %d; pad x and weight with zeros",
                   p.num_inputs, unit, unit, kMaxFeatures);
  }
  if (p.num_outputs < 1 || p.num_outputs > kMaxFeatures) {
    return explain("num_outputs: received %d, expected 1 .. %d", p.num_outputs, kMaxFeatures);
  }
  if (const char* problem = dtypeProblem(p.dtype)) return problem;
  if (!is_int8 && p.scale) return "scale: received a pointer, expected null with half weights";
  const size_t rows = p.num_rows, inputs = p.num_inputs, outputs = p.num_outputs;
  const Range ranges[] = {{"y", p.y, rows * outputs * 2},
                          {"x", p.x, rows * inputs * 2},
                          {"weight", p.weight, outputs * inputs * (is_int8 ? 1 : 2)},
                          {"scale", p.scale, outputs * sizeof(float), !is_int8},
                          {"bias", p.bias, outputs * 2, true}};
  for (const Range& range : ranges) {
    if (!range.data && !range.optional) {
      return explain("%s: received null, expected a device pointer", range.name);
    }
    if (range.address() % 16) {
      return explain("%s: received %p, expected a device pointer that is a multiple of 16", range.name, range.data);
    }
    if (&range != ranges && range.data && range.address() < ranges[0].address() + ranges[0].bytes &&
        ranges[0].address() < range.address() + range.bytes) {
      return explain("y: overlaps %s, expected memory of its own", range.name);
    }
  }
  return nullptr;
}

cudaError_t launchLinear(const LinearParams& params, void* workspace, cudaStream_t stream) {
  if (linearProblem(params)) return cudaErrorInvalidValue;
  if (linearWorkspaceBytes(params) && (!workspace || reinterpret_cast<size_t>(workspace) % 16)) {
    return cudaErrorInvalidValue;
  }
  Device device;
  const cudaError_t error = describeDevice(device);
  if (error != cudaSuccess) return error;
  return params.dtype == DType::kFloat16 ? launchTyped<__half>(params, workspace, device, stream)
                                         : launchTyped<__nv_bfloat16>(params, workspace, device, stream);
}

}  // namespace sinkexport
