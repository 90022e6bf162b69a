// Matmuls of few tokens by one matrix, with all of x in each block's shared memory and what stands beside a matmul in a
// decoder layer: the norm of x, a residual, a gate. How lanes share a matmul: linear.cu; tiles and rings:
// linear_few.cuh.
//
// Rings hold weights alone, which no earlier kernel writes: where a kernel may start before the one ahead of it ends,
// they are filled before it waits. What is left to do after the wait is to read x, to norm it (every block by itself:
// a few KB from the L2 cache), to multiply what is there already, and to write y.
#pragma once

#include <algorithm>

#include "gated_activation.cuh"
#include "halves.cuh"
#include "linear_few.cuh"

namespace sinkexport {
namespace linear {

// Most bytes of x.
constexpr int kMostResidentBytes = 32 << 10;

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
__device__ __forceinline__ void normPiece(Piece<Half>& piece, float factor, const unsigned char* weights) {
#pragma unroll
  for (int k = 0; k < kHalvesOfPiece; ++k) {
    const float normal = toFloat(piece.halves[k]) * factor;
    const Weight weight = reinterpret_cast<const Weight*>(weights)[k];
    if constexpr (std::is_same_v<Weight, float>) {
      piece.halves[k] = fromFloat<Half>(normal * weight);
    } else {
      piece.halves[k] = fromFloat<Half>(toFloat(fromFloat<Half>(normal)) * toFloat(weight));
    }
  }
}

// x in shared memory, normed where a norm is asked for, padded with zeros to whole chunks. Warps share a token where
// there are more of them than tokens. By all threads; ends with a barrier.
template <typename S, typename Half, int kWarps, int kStages>
__device__ __forceinline__ void takeTokens(const LinearParams& p, const ResidentParts<S, kWarps, kStages>& parts,
                                           unsigned char* shared) {
  constexpr int kAtOnce = 4;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warps_of_token = p.num_rows < kWarps ? kWarps / p.num_rows : 1;
  const int first_token = warp / warps_of_token, tokens_at_once = kWarps / warps_of_token;
  const int first = warp % warps_of_token * kWarpSize + lane, step = warps_of_token * kWarpSize;
  const int num_pieces = p.num_inputs / kHalvesOfPiece, padded_pieces = parts.token_bytes / 16;
  float* const squares = reinterpret_cast<float*>(shared + parts.squares_at);
  const auto place = [&](int token, int piece) {
    return reinterpret_cast<Piece<Half>*>(shared + parts.tokens_at + token * parts.token_bytes +
                                          (piece ^ (token & 1) * S::kOddPieces) * 16);
  };
  static_assert(kWarps == 4 || kWarps == 6 || kWarps == 8, "all warps have a token, or none is left over");
  for (int token = first_token; token < p.num_rows; token += tokens_at_once) {
    const Piece<Half>* const from = static_cast<const Piece<Half>*>(p.x) + static_cast<size_t>(token) * num_pieces;
    float sum = 0.0f;
    for (int base = first; base < padded_pieces; base += kAtOnce * step) {
      Piece<Half> pieces[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = base + i * step;
        if (piece < num_pieces) {
          pieces[i] = from[piece];
        } else {
          *reinterpret_cast<uint4*>(&pieces[i]) = uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (base + i * step >= padded_pieces) continue;
#pragma unroll
        for (int k = 0; k < kHalvesOfPiece; ++k) {
          const float value = toFloat(pieces[i].halves[k]);
          sum = fmaf(value, value, sum);
        }
        *place(token, base + i * step) = pieces[i];
      }
    }
    if (p.norm_weight) {
      sum = warpSum(sum);
      if (lane == 0) squares[token * kWarps + warp % warps_of_token] = sum;
    }
  }
  if (p.norm_weight) {
    waitForCopies<kStages - 2>();  // the norm's weights came with the first stage
    __syncthreads();
    const unsigned char* const weights = shared + parts.norm_at;
    for (int token = first_token; token < p.num_rows; token += tokens_at_once) {
      float sum = 0.0f;
      for (int w = 0; w < warps_of_token; ++w) sum += squares[token * kWarps + w];
      const float factor = 1.0f / sqrtf(sum / static_cast<float>(p.num_inputs) + p.norm_epsilon);
      for (int piece = first; piece < num_pieces; piece += step) {
        if (p.float_norm_weight) {
          normPiece<Half, float>(*place(token, piece), factor, weights + piece * kHalvesOfPiece * 4);
        } else {
          normPiece<Half, Half>(*place(token, piece), factor, weights + piece * kHalvesOfPiece * 2);
        }
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ float activatedBy(Activation activation, float x) {
  using gated_activation::activated;
  return activation == Activation::kSilu   ? activated<Activation::kSilu>(x)
         : activation == Activation::kGelu ? activated<Activation::kGelu>(x)
                                           : activated<Activation::kGeluTanh>(x);
}

// What makes number i of a tile's [tokens, outputs] of its sums: read before they are there. first_row: of y.
template <typename Weight, typename Half>
struct ResidentOutput {
  float scale[2] = {1.0f, 1.0f}, bias[2] = {0.0f, 0.0f};  // of the gate, or of all, and of up
  float residual = 0.0f;
  size_t at = 0;
  bool valid = false;

  __device__ __forceinline__ ResidentOutput(const LinearParams& p, int i, int rows, int first_row) {
    const int width = p.is_gated ? p.num_outputs / 2 : p.num_outputs;
    const int token = i / rows, output = first_row + i % rows;
    valid = token < p.num_rows && output < width;
    if (!valid) return;
    at = static_cast<size_t>(token) * width + output;
    if (p.residual) residual = toFloat(static_cast<const Half*>(p.residual)[at]);
    for (int part = 0; part < (p.is_gated ? 2 : 1); ++part) {
      const Output<Weight, Half> finish(p, output + part * width);
      scale[part] = finish.scale, bias[part] = finish.bias;
    }
  }
};

// One tile's outputs of the sums of all warps [kWarps, tokens, kRows]. output: that of number threadIdx.x.
template <typename Weight, typename Half, int kRows, int kWarps>
__device__ __forceinline__ void storeResident(const LinearParams& p, const float* sums, int first_row,
                                              ResidentOutput<Weight, Half> output) {
  const int rows = p.is_gated ? kRows / 2 : kRows;
  for (int i = threadIdx.x; i < p.num_rows * rows; i += kWarps * kWarpSize) {
    if (i >= kWarps * kWarpSize) output = ResidentOutput<Weight, Half>(p, i, rows, first_row);
    if (!output.valid) continue;
    const float* const sums_of_token = sums + i / rows * kRows;
    float totals[2] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* const from = sums_of_token + w * p.num_rows * kRows + i % rows;
      totals[0] += from[0];
      if (p.is_gated) totals[1] += from[rows];
    }
    float value = fmaf(totals[0], output.scale[0], output.bias[0]) + output.residual;
    if (p.is_gated) value = activatedBy(p.activation, value) * fmaf(totals[1], output.scale[1], output.bias[1]);
    static_cast<Half*>(p.y)[output.at] = fromFloat<Half>(value);
  }
}

// Asks for what storeResident reads that no earlier kernel writes, of one tile.
template <typename Weight>
__device__ __forceinline__ void prefetchOutputs(const LinearParams& p, int first_row) {
  const int lane = threadIdx.x, width = p.is_gated ? p.num_outputs / 2 : p.num_outputs;
  if (lane >= (p.is_gated ? 2 : 1)) return;
  const int output = first_row + lane * width;
  if (kIsInt8<Weight>) prefetchLine(p.scale + output);
  if (p.bias) prefetchLine(static_cast<const uint16_t*>(p.bias) + output);
}

// Each block takes every gridDim.x-th tile. kRowTiles: 2 where p.is_gated, one of gates and one of ups.
template <typename Weight, typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages, int kLine>
__global__ void __launch_bounds__(kWarps* kWarpSize, kFewBlocks) fewTokensResident(const LinearParams p) {
  using S = FewStage<Weight, kRowTiles, kLine>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const ResidentParts<S, kWarps, kStages> parts(p);
  unsigned char* const ring = shared + warp * parts.kRingBytes;
  const int num_chunks = divideUp(p.num_inputs, S::kChunk);
  const int num_steps = num_chunks > warp ? divideUp(num_chunks - warp, kWarps) : 0;  // of this warp in a tile
  const int width = p.is_gated ? p.num_outputs / 2 : p.num_outputs, rows = p.is_gated ? S::kRows / 2 : S::kRows;
  const int num_tiles = divideUp(width, rows), tile_step = p.is_gated ? width : 16;

  allowNextKernel();
  if (!p.constant_weight) waitForEarlierKernels();
  int copy_index = blockIdx.x, copy_step = 0, copy_stage = 0;  // what is copied next, and where to
  const auto copyNext = [&] {
    if (copy_index < num_tiles && num_steps > 0) {
      S::copyWeights(ring + copy_stage * S::kWeightBytes, p, {copy_index * rows, p.num_rows, 0, 0, tile_step},
                     (warp + copy_step * kWarps) * S::kChunk, lane);
    }
    commitCopies();
    if (++copy_step >= num_steps) copy_step = 0, copy_index += gridDim.x;
    if (++copy_stage == kStages) copy_stage = 0;
  };
  if (p.norm_weight) {
    const int num_units = p.num_inputs * (p.float_norm_weight ? 4 : 2) / 16;
    for (int i = threadIdx.x; i < num_units; i += kWarps * kWarpSize) {
      copyAsync(shared + parts.norm_at + i * 16, static_cast<const uint4*>(p.norm_weight) + i, 16);
    }
  }
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copyNext();
  prefetchOutputs<Weight>(p, blockIdx.x * rows);
  if (p.constant_weight) waitForEarlierKernels();
  ResidentOutput<Weight, Half> output(p, threadIdx.x, rows, blockIdx.x * rows);
  takeTokens<S, Half>(p, parts, shared);

  int read_stage = 0, turn = 0;
  for (int index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    if (index != static_cast<int>(blockIdx.x)) output = ResidentOutput<Weight, Half>(p, threadIdx.x, rows, index * rows);
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
    storeResident<Weight, Half, S::kRows, kWarps>(p, sums, index * rows, output);
  }
}

// --- launches ---

// Whether a matmul is one that blocks can hold the tokens of; by shapes alone.
inline bool isResident(const LinearParams& p) {
  return p.num_rows <= 8 && p.num_rows * p.num_inputs * 2 <= kMostResidentBytes;
}

// True: launched, or `error`. False: shared memory is too short, or, if `must_share`, for two blocks.
template <typename Weight, typename Half, int kRowTiles, int kWarps, int kStages, int kLine = kLineBytes>
bool launchResident(const LinearParams& p, const Device& device, cudaStream_t stream, cudaError_t& error,
                    bool must_share = false) {
  using S = FewStage<Weight, kRowTiles, kLine>;
  const int needed_bytes = ResidentParts<S, kWarps, kStages>(p).bytes;
  const int share = device.shared_bytes_of_all / kFewBlocks - kReservedSharedBytes;
  if (needed_bytes > device.shared_bytes || (must_share && needed_bytes > share)) return false;
  // Each block has half of a multiprocessor's memory even if it needs less (linear_few.cuh).
  const int shared_bytes = std::max(needed_bytes, std::min(share, device.shared_bytes));
  const int blocks = device.multiprocessors * (needed_bytes <= share ? kFewBlocks : 1);
  const int tiles = p.is_gated ? divideUp(p.num_outputs / 2, 16) : divideUp(p.num_outputs, 16 * kRowTiles);
  error = launch(fewTokensResident<Weight, Half, kRowTiles, 1, kWarps, kStages, kLine>, dim3(std::min(tiles, blocks)),
                 kWarps * kWarpSize, shared_bytes, device, stream, p);
  return true;
}

}  // namespace linear
}  // namespace sinkexport
