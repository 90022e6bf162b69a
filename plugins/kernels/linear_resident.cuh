// Matmuls of few tokens by one matrix, with all of x in each block's shared memory and what stands beside a matmul in a
// decoder layer: the norm of x, a residual, a gate. How lanes share a matmul: linear.cu; tiles and rings:
// linear_few.cuh.
//
// Rings hold weights alone, which no earlier kernel writes: where a kernel may start before the one ahead of it ends,
// they are filled before it waits. What is left to do after the wait is to read x, to norm it (every block by itself:
// a few KB from the L2 cache), to multiply what is there already, and to write y.
#pragma once

#include <algorithm>

#include "halves.cuh"
#include "linear_few.cuh"

namespace sinkexport {
namespace linear {

// Most bytes of x with a norm, and without one, and then most inputs: as measured on an H200 (README.md).
constexpr int kMostNormedBytes = 10 << 10, kMostPlainBytes = 24 << 10, kMostPlainInputs = 3072;

// Parts of the shared memory of a block.
template <typename S, int kWarps, int kStages>
struct ResidentParts {
  static constexpr int kRingBytes = kStages * S::kWeightBytes;  // of a warp
  int token_bytes, sums_at, tokens_at, norm_at, squares_at, bytes;

  __host__ __device__ explicit ResidentParts(const LinearParams& p)
      : token_bytes(divideUp(p.num_inputs, S::kChunk) * S::kTokenBytes),
        sums_at(kWarps * kRingBytes),
        tokens_at(sums_at + 2 * kWarps * p.num_rows * S::kRows * static_cast<int>(sizeof(float))),
        norm_at(tokens_at + p.num_rows * token_bytes),
        squares_at(norm_at + (p.norm_weight ? p.num_inputs * (p.float_norm_weight ? 4 : 2) : 0)),
        bytes(squares_at + (p.norm_weight ? kWarps * p.num_rows * static_cast<int>(sizeof(float)) : 0)) {}
};

// Eight values times their norm's factor and weights, rounded as rms_norm.h says.
template <typename Half, typename Weight>
__device__ __forceinline__ Piece<Half> normed(const Piece<Half>& piece, float factor, const unsigned char* weights) {
  struct alignas(16) {
    Weight entries[kHalvesOfPiece];
  } factors;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof factors / sizeof(uint4)); ++i) {
    reinterpret_cast<uint4*>(&factors)[i] = reinterpret_cast<const uint4*>(weights)[i];
  }
  Piece<Half> result;
#pragma unroll
  for (int k = 0; k < kHalvesOfPiece; ++k) {
    const float normal = toFloat(piece.halves[k]) * factor;
    if constexpr (std::is_same_v<Weight, float>) {
      result.halves[k] = fromFloat<Half>(normal * factors.entries[k]);
    } else {
      result.halves[k] = fromFloat<Half>(toFloat(fromFloat<Half>(normal)) * toFloat(factors.entries[k]));
    }
  }
  return result;
}

// The pieces and tokens that a thread takes: warps share a token where there are more of them than tokens.
template <int kWarps>
struct TokenShare {
  static_assert(kWarps == 4 || kWarps == 8, "tokens have as many warps each");
  int warps_of_token, first_token, tokens_at_once, warp_of_token, first_piece, step;

  __device__ __forceinline__ explicit TokenShare(int num_tokens) {
    constexpr int kShift = kWarps == 8 ? 3 : 2;
    const int shift = max(0, kShift - (num_tokens > 4 ? 3 : num_tokens > 2 ? 2 : num_tokens > 1 ? 1 : 0));
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    warps_of_token = 1 << shift, first_token = warp >> shift, tokens_at_once = kWarps >> shift;
    warp_of_token = warp & (warps_of_token - 1), first_piece = warp_of_token * kWarpSize + lane;
    step = kWarpSize << shift;
  }
};

// x in shared memory, normed where a norm is asked for, padded with zeros to whole chunks. By all threads; ends with a
// barrier.
template <typename S, typename Half, int kWarps, int kStages>
__device__ __forceinline__ void takeTokens(const LinearParams& p, const ResidentParts<S, kWarps, kStages>& parts,
                                           const TokenShare<kWarps>& share, unsigned char* shared) {
  constexpr int kAtOnce = 4;
  const int num_pieces = p.num_inputs / kHalvesOfPiece, padded_pieces = parts.token_bytes / 16;
  float* const squares = reinterpret_cast<float*>(shared + parts.squares_at);
  const auto place = [&](int token, int piece) {
    return reinterpret_cast<Piece<Half>*>(shared + parts.tokens_at + token * parts.token_bytes +
                                          (piece ^ (token & 1) * S::kOddPieces) * 16);
  };
  for (int token = share.first_token; token < p.num_rows; token += share.tokens_at_once) {
    const Piece<Half>* const from = static_cast<const Piece<Half>*>(p.x) + static_cast<size_t>(token) * num_pieces;
    float sum = 0.0f;
    for (int base = share.first_piece; base < padded_pieces; base += kAtOnce * share.step) {
      Piece<Half> pieces[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = base + i * share.step;
        if (piece < num_pieces) {
          pieces[i] = from[piece];
        } else {
          *reinterpret_cast<uint4*>(&pieces[i]) = uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (base + i * share.step >= padded_pieces) continue;
#pragma unroll
        for (int k = 0; k < kHalvesOfPiece; ++k) {
          const float value = toFloat(pieces[i].halves[k]);
          sum = fmaf(value, value, sum);
        }
        *place(token, base + i * share.step) = pieces[i];
      }
    }
    if (p.norm_weight) {
      sum = warpSum(sum);
      if (share.first_piece % kWarpSize == 0) squares[token * kWarps + share.warp_of_token] = sum;
    }
  }
  if (p.norm_weight) {
    waitForCopies<kStages - 2>();  // the norm's weights came with the first stage
    __syncthreads();
    const unsigned char* const weights = shared + parts.norm_at;
    for (int token = share.first_token; token < p.num_rows; token += share.tokens_at_once) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += w < share.warps_of_token ? squares[token * kWarps + w] : 0.0f;
      const float factor = rsqrtf(sum / static_cast<float>(p.num_inputs) + p.norm_epsilon);
      for (int piece = share.first_piece; piece < num_pieces; piece += share.step) {
        Piece<Half>* const at = place(token, piece);
        *at = p.float_norm_weight ? normed<Half, float>(*at, factor, weights + piece * kHalvesOfPiece * 4)
                                  : normed<Half, Half>(*at, factor, weights + piece * kHalvesOfPiece * 2);
      }
    }
  }
  __syncthreads();
}

// Each block takes every gridDim.x-th tile. kIsGated: half of a tile's outputs are gates, the other half their ups.
template <typename Weight, typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages, int kLine,
          bool kIsGated>
__global__ void __launch_bounds__(kWarps* kWarpSize, kFewBlocks) fewTokensResident(const OneMatrix<kIsGated> task) {
  const LinearParams& p = task.p;
  using S = FewStage<Weight, kRowTiles, kLine>;
  using Output = TileOutput<Weight, Half, S::kRows, kIsGated>;
  constexpr int kThreads = kWarps * kWarpSize;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const ResidentParts<S, kWarps, kStages> parts(p);
  unsigned char* const ring = shared + warp * parts.kRingBytes;
  const int num_chunks = divideUp(p.num_inputs, S::kChunk);
  const int num_steps = num_chunks > warp ? divideUp(num_chunks - warp, kWarps) : 0;  // of this warp in a tile
  const typename OneMatrix<kIsGated>::template Plan<S::kRows> plan(task, nullptr);
  const int num_tiles = plan.numTiles();

  allowNextKernel();
  if (!p.constant_weight) waitForEarlierKernels();
  int copy_index = blockIdx.x, copy_step = 0, copy_stage = 0;  // what is copied next, and where to
  const auto copyNext = [&] {
    if (copy_index < num_tiles && num_steps > 0) {
      S::copyWeights(ring + copy_stage * S::kWeightBytes, p, plan.tile(copy_index),
                     (warp + copy_step * kWarps) * S::kChunk, lane);
    }
    commitCopies();
    if (++copy_step >= num_steps) copy_step = 0, copy_index += gridDim.x;
    if (++copy_stage == kStages) copy_stage = 0;
  };
  if (p.norm_weight) {
    const int num_units = p.num_inputs * (p.float_norm_weight ? 4 : 2) / 16;
    for (int i = threadIdx.x; i < num_units; i += kThreads) {
      copyAsync(shared + parts.norm_at + i * 16, static_cast<const uint4*>(p.norm_weight) + i, 16);
    }
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copyNext();
  const TokenShare<kWarps> share(p.num_rows);
  Output output(p, plan, plan.tile(blockIdx.x), threadIdx.x);
  if (p.constant_weight) waitForEarlierKernels();
  output.readResidual(p);
  takeTokens<S, Half>(p, parts, share, shared);

  int read_stage = 0, turn = 0;
  for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    if (index != static_cast<int>(blockIdx.x)) {
      output = Output(p, plan, plan.tile(index), threadIdx.x);
      output.readResidual(p);
    }
    float sum[kRowTiles][kTokenTiles][4] = {};
    for (int step = 0; step < num_steps; ++step) {
      waitForCopies<kStages - 2>();
      __syncwarp();
      copyNext();  // into the stage that all lanes have read in the step before
      const int first_k = (warp + step * kWarps) * S::kChunk;
      const FewTokens tokens{shared + parts.tokens_at + first_k * 2, parts.token_bytes, p.num_rows};
      multiplyFew<S, Weight, Half>(sum, ring + read_stage * S::kWeightBytes, tokens, p, lane);
      if (++read_stage == kStages) read_stage = 0;
    }
    // Sums of all warps as [kWarps, tokens, kRows], in two places by turns: who writes one has passed the barrier after
    // the other was written, and so has everyone who reads from it.
    const int sums_of_warp = p.num_rows * S::kRows;
    float* const sums = reinterpret_cast<float*>(shared + parts.sums_at) + turn * kWarps * sums_of_warp;
    turn ^= 1;
    shareSums<Weight, Half>(sum, sums + warp * sums_of_warp, p.num_rows, lane);
    __syncthreads();
    storeTile<kWarps>(p, plan, plan.tile(index), output, sums, sums_of_warp);
  }
}

// --- launches ---

// Whether each block has one tile of a matmul, or none.
inline bool isOneRound(const LinearParams& p, const Device& device) {
  return divideUp(p.num_outputs, p.is_gated ? 32 : 16) <= kFewBlocks * device.multiprocessors;
}

// Whether blocks should hold all tokens. Each reads them before it multiplies: with a norm that is as long as their
// bytes take less than a launch, without one it pays where most of a block's weights are on their way by then.
inline bool isResident(const LinearParams& p, const Device& device) {
  const int bytes = p.num_rows * p.num_inputs * 2;
  if (p.num_rows > 8) return false;
  if (p.norm_weight) return bytes <= kMostNormedBytes;
  return bytes <= kMostPlainBytes && p.num_inputs <= kMostPlainInputs && isOneRound(p, device);
}

// True: launched, or `error`. False: shared memory is too short, or, if `must_share`, for two blocks.
template <typename Weight, typename Half, int kRowTiles, int kWarps, int kStages, int kLine = kLineBytes,
          bool kIsGated = false>
bool launchResident(const LinearParams& p, const Device& device, cudaStream_t stream, cudaError_t& error,
                    bool must_share = false) {
  using S = FewStage<Weight, kRowTiles, kLine>;
  const int needed_bytes = ResidentParts<S, kWarps, kStages>(p).bytes;
  const int share = device.shared_bytes_of_all / kFewBlocks - kReservedSharedBytes;
  if (needed_bytes > device.shared_bytes || (must_share && needed_bytes > share)) return false;
  // Each block has half of a multiprocessor's memory even if it needs less (linear_few.cuh).
  const int shared_bytes = std::max(needed_bytes, std::min(share, device.shared_bytes));
  const int blocks = device.multiprocessors * (needed_bytes <= share ? kFewBlocks : 1);
  const dim3 grid(std::min(divideUp(p.num_outputs, 16 * kRowTiles), blocks));
  error = launch(fewTokensResident<Weight, Half, kRowTiles, 1, kWarps, kStages, kLine, kIsGated>, grid,
                 kWarps * kWarpSize, shared_bytes, device, stream, OneMatrix<kIsGated>{p});
  return true;
}

}  // namespace linear
}  // namespace sinkexport
