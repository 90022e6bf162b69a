// Matmuls of up to 16 tokens by a matrix, at the speed of memory: by one matrix (linear.cu), or by one of many for
// each group of tokens (expert_linear.cu). How lanes share a matmul: linear.cu.
//
// A block takes tiles of 16 or 32 outputs and its warps split k among them. Each warp has a ring of chunks of its own
// in shared memory, filled by asynchronous copies. Their sums are added at the end of a tile, in order. Weights are
// read once. No second launch, no workspace: a few blocks with so much on its way fill the memory's queue.
#pragma once

#include <algorithm>

#include "linear.cuh"
#include "linear_few_int4.cuh"
#include "linear_few_tile.cuh"

namespace sinkexport {
namespace linear {

// What fewTokens computes: the parameter of the kernel, from which each block makes a plan. This one: all tokens by one
// matrix. kIsGated_: its rows are gate | up.
template <bool kIsGated_ = false>
struct OneMatrix {
  // Whether a plan can be made before earlier work in the stream has ended.
  static constexpr bool kPlansEarly = true;
  // Whether half of a tile's outputs are gates, and the other half their ups.
  static constexpr bool kIsGated = kIsGated_;

  LinearParams p;

  // Most tokens of a tile.
  __host__ __device__ int maxTokens() const { return p.num_rows; }
  // Most tiles of this many outputs.
  int maxTiles(int rows) const { return divideUp(p.num_outputs, rows); }
  // Shared memory of a plan.
  int sharedBytes() const { return 0; }

  template <int kRows>
  struct Plan {
    const LinearParams& p;
    __device__ __forceinline__ Plan(const OneMatrix& task, unsigned char* /*shared*/) : p(task.p) {}
    __device__ __forceinline__ int numTiles() const { return divideUp(p.num_outputs, kRows); }
    // What a block remembers of the tile that it is at.
    using Place = int;
    __device__ __forceinline__ Place place(int index) const { return index; }
    __device__ __forceinline__ FewTile tile(Place index) const {
      return kIsGated ? FewTile{index * kRows / 2, p.num_rows, 0, 0, p.num_outputs / 2}
                      : FewTile{index * kRows, p.num_rows, 0, 0};
    }
    // Rows of x and of y.
    __device__ __forceinline__ int inputRow(const FewTile&, int token) const { return token; }
    __device__ __forceinline__ int outputRow(const FewTile&, int token) const { return token; }
  };
};

constexpr int kLineBytes = 128;  // of each weight row in a warp's step, or half of it

template <typename Weight, int kLine>
constexpr int kFewChunk = kLine * 8 / kBits<Weight>;  // k of a step

// Of the weights of a tile of 16 outputs in a stage; with INT4 ones scales and zero points of blocks of 32 included.
template <typename Weight, int kLine>
constexpr int kFewTileBytes = 16 * kLine + (kIsInt4<Weight> ? kFewChunk<Weight, kLine> / 32 * kInt4GroupBytes : 0);

template <typename Weight, int kLine>
__host__ __device__ constexpr int fewStageBytes(int row_tiles, int num_tokens) {
  return row_tiles * kFewTileBytes<Weight, kLine> + num_tokens * kFewChunk<Weight, kLine> * 2;
}

template <typename Weight, int kLine = kLineBytes>
__host__ __device__ constexpr int fewSharedBytes(int row_tiles, int num_tokens, int warps, int stages) {
  const int sum_bytes = 16 * row_tiles * num_tokens * static_cast<int>(sizeof(float));
  return warps * (stages * fewStageBytes<Weight, kLine>(row_tiles, num_tokens) + 2 * sum_bytes);
}

// A stage: weights, then tokens, of as many k as kLine bytes of a weight row hold.
template <typename Weight, int kRowTiles, int kLine>
struct FewStage {
  static constexpr int kChunk = kFewChunk<Weight, kLine>;
  static constexpr int kRows = 16 * kRowTiles;      // outputs of a tile
  static constexpr int kTokenBytes = 2 * kChunk;    // of one token in a stage
  static constexpr int kPieces = kTokenBytes / 16;  // the same in units of a copy
  static constexpr int kWeightBytes = kRowTiles * kFewTileBytes<Weight, kLine>;
  static constexpr int kUnit = kUnitWeights<Weight>;
  static constexpr int kUnits = kLine / 16;      // of a row
  static constexpr int kTileBytes = 16 * kLine;  // of the weights of 16 outputs
  static constexpr int kNumRowTiles = kRowTiles;
  // By which 16-byte units of odd rows and of odd tokens trade places, so that lanes of two read from all banks.
  static constexpr int kOddUnits = kUnits / 2;
  static constexpr int kOddPieces = kIsInt8<Weight> ? 1 : 4;

  // By a warp.
  static __device__ __forceinline__ void copyWeights(unsigned char* stage, const LinearParams& p, const FewTile& tile,
                                                     int first_k, int lane) {
    if constexpr (kIsInt4<Weight>) {
      copyInt4<FewStage>(stage, p, tile.first_output, tile.first_row, tile.tile_step, first_k, lane);
    } else {
      const Weight* const weight = static_cast<const Weight*>(p.weight);
      const int num_inputs = p.num_inputs, num_outputs = p.num_outputs;
      constexpr int kRowsAtOnce = kWarpSize / kUnits;
      const int row = lane / kUnits, unit = lane % kUnits;  // then kRowsAtOnce rows on, and so on
      unsigned char* const to = stage + row * kLine + (unit ^ (row & 1) * kOddUnits) * 16;
      const int first_row = tile.first_row;
      const size_t offset = (tile.first_output + first_row + row) * num_inputs + first_k + unit * kUnit;
#pragma unroll
      for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
        const int rows_on = kRowsAtOnce * i % 16 + kRowsAtOnce * i / 16 * tile.tile_step;
        const bool valid = first_row + row + rows_on < num_outputs && first_k + unit * kUnit < num_inputs;
        const Weight* const from = weight + (valid ? offset + static_cast<size_t>(rows_on) * num_inputs : 0);
        copyAsync(to + kRowsAtOnce * i * kLine, from, valid ? 16 : 0);
      }
    }
  }

  // Where the i-th 16-byte piece of the tokens is.
  static __device__ __forceinline__ unsigned char* placeOfPiece(unsigned char* stage, int i) {
    const int token = i / kPieces, piece = i % kPieces;
    return stage + kWeightBytes + token * kTokenBytes + (piece ^ (token & 1) * kOddPieces) * 16;
  }
};

// Blocks that a multiprocessor has at a time.
constexpr int kFewBlocks = 2;

// sum += the chunk's weights, which are at `stage`, by its tokens.
template <typename S, typename Weight, typename Half, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiplyFew(float (&sum)[kRowTiles][kTokenTiles][4], const unsigned char* stage,
                                            const FewTokens& tokens, const LinearParams& p, int lane) {
  if constexpr (kIsInt4<Weight>) {
    multiplyInt4<S, Half>(sum, stage, tokens, p, lane);
  } else {
    constexpr int kUnitPieces = S::kUnit / 8;  // of a token, beside one unit of weights
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int part = 0; part < S::kUnits / 4; ++part) {  // four units of k
      uint4 b[kTokenTiles][kUnitPieces];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = 8 * j + g;
#pragma unroll
        for (int i = 0; i < kUnitPieces; ++i) {
          const int piece = ((part * 4 + t) * kUnitPieces + i) ^ (token & 1) * S::kOddPieces;
          b[j][i] = token < tokens.count
                        ? *reinterpret_cast<const uint4*>(tokens.first + token * tokens.bytes + piece * 16)
                        : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const unsigned char* const rows =
            stage + (16 * r + g) * (S::kTileBytes / 16) + ((part * 4 + t) ^ (g & 1) * S::kOddUnits) * 16;
        const uint4 near = *reinterpret_cast<const uint4*>(rows);
        const uint4 far = *reinterpret_cast<const uint4*>(rows + S::kTileBytes / 2);
#pragma unroll
        for (int s = 0; s < S::kUnit / 4; ++s) {
          uint32_t a[4];
          takeTile<Weight, Half>(a, near, far, s);
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            const uint4 piece = b[j][s / 2];
            multiplyAdd<Half>(sum[r][j], a, s % 2 ? piece.z : piece.x, s % 2 ? piece.w : piece.y);
          }
        }
      }
    }
  }
}

// Each block takes every gridDim.x-th tile; chunks of k go round its warps. To a warp all that is one sequence of
// steps, so that its copies for a tile are on their way while the one before it is finished.
template <typename Weight, typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages, int kLine,
          typename Task>
__global__ void __launch_bounds__(kWarps* kWarpSize, kIsInt4<Weight> ? kFewBlocks : 0) fewTokens(const Task task) {
  using S = FewStage<Weight, kRowTiles, kLine>;
  constexpr int kRows = S::kRows, kPieces = S::kPieces;
  extern __shared__ __align__(16) unsigned char shared[];
  const LinearParams& p = task.p;
  const int max_tokens = task.maxTokens(), num_inputs = p.num_inputs;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int stage_bytes = fewStageBytes<Weight, kLine>(kRowTiles, max_tokens);
  unsigned char* const ring = shared + warp * kStages * stage_bytes;
  float* const all_sums = reinterpret_cast<float*>(shared + kWarps * kStages * stage_bytes);
  const int num_chunks = divideUp(num_inputs, S::kChunk);
  const int num_steps = num_chunks > warp ? divideUp(num_chunks - warp, kWarps) : 0;  // of this warp in a tile
  const Half* const x = static_cast<const Half*>(p.x);

  const auto copyWeights = [&](unsigned char* stage, const FewTile& tile, int first_k) {
    S::copyWeights(stage, p, tile, first_k, lane);
  };
  allowNextKernel();
  if (!Task::kPlansEarly || !p.constant_weight) waitForEarlierKernels();
  unsigned char* const plan_memory = reinterpret_cast<unsigned char*>(all_sums + 2 * kWarps * max_tokens * kRows);
  const typename Task::template Plan<kRows> plan(task, plan_memory);
  const int num_tiles = plan.numTiles();
  int copy_index = blockIdx.x, copy_step = 0, copy_stage = 0;  // what is copied next, and where to
  auto copy_place = plan.place(copy_index);
  const auto advanceCopy = [&] {
    commitCopies();
    if (++copy_step >= num_steps) {
      copy_step = 0, copy_index += gridDim.x;
      copy_place = plan.place(copy_index);
    }
    if (++copy_stage == kStages) copy_stage = 0;
  };
  const auto copyNext = [&] {
    if (copy_index < num_tiles) {
      unsigned char* const stage = ring + copy_stage * stage_bytes;
      const int first_k = (warp + copy_step * kWarps) * S::kChunk;
      const FewTile tile = plan.tile(copy_place);
      constexpr int kAtOnce = kIsInt4<Weight> ? 1 : 4;
#pragma unroll(kAtOnce)
      for (int i = lane; i < tile.num_tokens * kPieces; i += kWarpSize) {
        const int k = first_k + i % kPieces * 8;
        const bool valid = k < num_inputs;
        const size_t row = plan.inputRow(tile, i / kPieces);
        copyAsync(S::placeOfPiece(stage, i), x + (valid ? row * num_inputs + k : 0), valid ? 16 : 0);
      }
      copyWeights(stage, tile, first_k);
    }
    advanceCopy();
  };

  if constexpr (Task::kPlansEarly) {
    // The first stage's weights may be allowed to be read early. Not more of them: its tokens would queue behind.
    const FewTile first = plan.tile(copy_place);
    copyWeights(ring, first, warp * S::kChunk);
    advanceCopy();
    if (p.constant_weight) waitForEarlierKernels();
    uint4 pieces[kPieces * 8 * kTokenTiles / kWarpSize];
    constexpr int kNumPieces = sizeof pieces / sizeof *pieces;
#pragma unroll
    for (int j = 0; j < kNumPieces; ++j) {
      const int i = lane + j * kWarpSize, k = warp * S::kChunk + i % kPieces * 8;
      const bool valid = i < first.num_tokens * kPieces && k < num_inputs;
      const size_t row = plan.inputRow(first, i / kPieces);
      pieces[j] = valid ? *reinterpret_cast<const uint4*>(x + row * num_inputs + k) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 1; i < kStages - 1; ++i) copyNext();
#pragma unroll
    for (int j = 0; j < kNumPieces; ++j) {
      const int i = lane + j * kWarpSize;
      if (i < first.num_tokens * kPieces) *reinterpret_cast<uint4*>(S::placeOfPiece(ring, i)) = pieces[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) copyNext();
  }

  int read_stage = 0, turn = 0;
  for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const FewTile tile = plan.tile(plan.place(index));
    TileOutput<Weight, Half, kRows, Task::kIsGated> output(p, plan, tile, threadIdx.x);
    output.readResidual(p);
    float sum[kRowTiles][kTokenTiles][4] = {};
    for (int step = 0; step < num_steps; ++step) {
      waitForCopies<kStages - 2>();
      __syncwarp();
      copyNext();  // into the stage that all lanes have read in the step before
      const unsigned char* const stage = ring + read_stage * stage_bytes;
      if (++read_stage == kStages) read_stage = 0;
      multiplyFew<S, Weight, Half>(sum, stage, {stage + S::kWeightBytes, S::kTokenBytes, tile.num_tokens}, p, lane);
    }

    // Sums of all warps as [kWarps, tokens, kRows], in two places by turns: who writes one has passed the barrier after
    // the other was written, and so has everyone who reads from it.
    float* const sums = all_sums + turn * kWarps * max_tokens * kRows;
    turn ^= 1;
    shareSums<Weight, Half>(sum, sums + warp * max_tokens * kRows, tile.num_tokens, lane);
    __syncthreads();
    storeTile<kWarps>(p, plan, tile, output, sums, max_tokens * kRows);
  }
}

template <typename Weight, typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages,
          int kLine = kLineBytes, typename Task>
cudaError_t launchFew(const Task& task, const Device& device, cudaStream_t stream) {
  const int needed_bytes =
      fewSharedBytes<Weight, kLine>(kRowTiles, task.maxTokens(), kWarps, kStages) + task.sharedBytes();
  if constexpr (kWarps > 4) {
    if (needed_bytes > device.shared_bytes) {
      return launchFew<Weight, Half, kRowTiles, kTokenTiles, 4, kStages, kLine>(task, device, stream);
    }
  }
  // Two blocks on a multiprocessor, each with half of the memory even if it needs less: blocks of the next launch then
  // take the places of this one's as they end. With more room they would crowd where there is most of it.
  const int share = device.shared_bytes_of_all / kFewBlocks - kReservedSharedBytes;
  const int shared_bytes = std::max(needed_bytes, std::min(share, device.shared_bytes));
  const int blocks = device.multiprocessors * (needed_bytes <= share ? kFewBlocks : 1);
  const dim3 grid(std::min(task.maxTiles(16 * kRowTiles), blocks));
  return launch(fewTokens<Weight, Half, kRowTiles, kTokenTiles, kWarps, kStages, kLine, Task>, grid, kWarps * kWarpSize,
                shared_bytes, device, stream, task);
}

}  // namespace linear
}  // namespace sinkexport
