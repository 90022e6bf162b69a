// y = x . W^T * scale + bias with W in INT8 (int8_linear.h says which shapes).
//
// Both kernels multiply on the tensor cores, weights as the left factor (16 outputs a tile) and tokens as the right one
// (8 a tile): even for one token that takes fewer instructions a weight than multiplying and adding one by one, so that
// reading the weights is what is left. A sum over k has no order of its own, so lanes take 16 consecutive weights of a
// row (one 16-byte load) as the four k16 tiles' share of theirs, and the same k of the tokens:
// tile s, lane t of four: k = 16 t + 4 s .. + 3 of each 64.
//
// - Up to 16 tokens: a block owns 16 to 64 outputs and its warps split k among them, each with a ring of chunks of its own
//   in shared memory, filled by asynchronous copies; the warps' sums are added at the end, in order. Weights are read
//   once. No second launch, no workspace: a few blocks with that much on its way fill the memory's queue.
// - More tokens: blocks of 64 or 128 outputs x 32 or 64 tokens, their four warps side by side along the outputs, so that
//   each weight is converted once in a block. Where the tiles are fewer than the multiprocessors, k is split over blocks
//   too: float32 partial sums in the workspace, added in order by a second kernel. The split depends on shapes alone, so
//   results do not depend on the device.
#include "int8_linear.h"

#include <algorithm>
#include <cstdio>

#include "int8_linear.cuh"

namespace sinkexport {
namespace int8_linear {
namespace {

constexpr int kFewTokens = 16;
constexpr int kMaxTokens = 1 << 16;
constexpr int kMaxFeatures = 1 << 21;

__host__ __device__ constexpr int divideUp(int a, int b) { return (a + b - 1) / b; }

// What makes an output of a sum.
template <typename Half>
struct Output {
  float scale, bias;
  __device__ __forceinline__ Output(const Int8LinearParams& p, int output)
      : scale(p.scale[output]), bias(p.bias ? toFloat(static_cast<const Half*>(p.bias)[output]) : 0.0f) {}
  __device__ __forceinline__ Half operator()(float sum) const { return fromFloat<Half>(fmaf(sum, scale, bias)); }
};

// --- up to 16 tokens ---

constexpr int kFewChunk = 128;  // k of a warp's step: a whole 128-byte line of each weight row

__host__ __device__ constexpr int fewStageBytes(int row_tiles, int num_tokens) {
  return 16 * row_tiles * kFewChunk + num_tokens * kFewChunk * 2;
}

template <typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps* kWarpSize) fewTokens(const Int8LinearParams p, int prefetch_bytes) {
  constexpr int kRows = 16 * kRowTiles;  // outputs of this block
  extern __shared__ __align__(16) unsigned char shared[];
  const int num_tokens = p.num_rows, num_inputs = p.num_inputs;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows;
  const int stage_bytes = fewStageBytes(kRowTiles, num_tokens);
  unsigned char* const ring = shared + warp * kStages * stage_bytes;

  allowNextKernel();
  if (threadIdx.x < kRows && first_row + threadIdx.x < p.num_outputs && prefetch_bytes) {
    prefetchL2(p.weight + static_cast<size_t>(first_row + threadIdx.x) * num_inputs, min(num_inputs, prefetch_bytes));
  }
  waitForEarlierKernels();

  // Chunks of k go round the warps: warp, warp + kWarps, ...
  const int num_chunks = divideUp(num_inputs, kFewChunk);
  const int num_steps = num_chunks > warp ? divideUp(num_chunks - warp, kWarps) : 0;
  const int row = lane / 8, unit = lane % 8;  // of 16 bytes, as this lane copies weights; then 4 rows on, and so on
  const int8_t* const weight = p.weight + static_cast<size_t>(first_row + row) * num_inputs + unit * 16;
  const Half* const x = static_cast<const Half*>(p.x);
  const auto copyStep = [&](int step) {
    if (step < num_steps) {
      unsigned char* const stage = ring + step % kStages * stage_bytes;
      const int first_k = (warp + step * kWarps) * kFewChunk;
      // 16-byte units of odd rows trade places, so that lanes of two rows read from all banks.
      unsigned char* const to = stage + row * kFewChunk + (unit ^ (row & 1) << 2) * 16;
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
        const bool valid = first_row + row + 4 * i < p.num_outputs && first_k + unit * 16 < num_inputs;
        const int8_t* const from = weight + static_cast<size_t>(4 * i) * num_inputs + first_k;
        copyAsync(to + 4 * i * kFewChunk, valid ? from : p.weight, valid ? 16 : 0);
      }
      for (int i = lane; i < num_tokens * (kFewChunk / 8); i += kWarpSize) {
        const int token = i / (kFewChunk / 8), piece = i % (kFewChunk / 8), k = first_k + piece * 8;
        const bool valid = k < num_inputs;
        copyAsync(stage + kRows * kFewChunk + token * kFewChunk * 2 + (piece ^ (token & 1)) * 16,
                  valid ? x + static_cast<size_t>(token) * num_inputs + k : x, valid ? 16 : 0);
      }
    }
    commitCopies();
  };

  float sum[kRowTiles][kTokenTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copyStep(step);
  for (int step = 0; step < num_steps; ++step) {
    waitCopies<kStages - 2>();
    __syncwarp();
    copyStep(step + kStages - 1);  // into the stage that all lanes have read in the step before
    const unsigned char* const stage = ring + step % kStages * stage_bytes;
    const unsigned char* const tokens = stage + kRows * kFewChunk;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 64 k of the 128
      uint4 b[kTokenTiles][2];              // 16 k of a token
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = 8 * j + g;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int piece = (half * 8 + t * 2 + i) ^ (token & 1);
          b[j][i] = token < num_tokens ? *reinterpret_cast<const uint4*>(tokens + token * kFewChunk * 2 + piece * 16)
                                       : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const unsigned char* const rows = stage + (16 * r + g) * kFewChunk + ((half * 4 + t) ^ (g & 1) << 2) * 16;
        const uint4 near = *reinterpret_cast<const uint4*>(rows);
        const uint4 far = *reinterpret_cast<const uint4*>(rows + 8 * kFewChunk);
        const uint32_t words[4][2] = {{near.x, far.x}, {near.y, far.y}, {near.z, far.z}, {near.w, far.w}};
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          uint32_t a[4];
          dequantise(words[s][0], a[0], a[2], Half{});
          dequantise(words[s][1], a[1], a[3], Half{});
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            const uint4 piece = b[j][s / 2];
            multiply<Half>(sum[r][j], a, s % 2 ? piece.z : piece.x, s % 2 ? piece.w : piece.y);
          }
        }
      }
    }
  }
  waitCopies<0>();
  __syncthreads();

  // The rings are free now: sums of all warps as [kWarps, tokens, kRows].
  float* const sums = reinterpret_cast<float*>(shared);
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
    const int token = i / kRows, output = first_row + i % kRows;
    if (output >= p.num_outputs) continue;
    static_cast<Half*>(p.y)[static_cast<size_t>(token) * p.num_outputs + output] = Output<Half>(p, output)(total);
  }
}

// --- more tokens ---

constexpr int kManyWarps = 4;
constexpr int kManyChunk = 64;  // k of a step

__host__ __device__ constexpr int manyStageBytes(int row_tiles, int token_tiles) {
  return kManyWarps * 16 * row_tiles * kManyChunk + 8 * token_tiles * kManyChunk * 2;
}

// Grid: token tiles, output tiles, splits of k. `partial` [splits, M, N], or null if there is one split.
template <typename Half, int kRowTiles, int kTokenTiles, int kStages>
__global__ void __launch_bounds__(kManyWarps* kWarpSize)
    manyTokens(const Int8LinearParams p, float* __restrict__ partial, int chunks_per_split) {
  constexpr int kThreads = kManyWarps * kWarpSize;
  constexpr int kRows = kManyWarps * 16 * kRowTiles, kTokens = 8 * kTokenTiles;
  constexpr int kStageBytes = manyStageBytes(kRowTiles, kTokenTiles);
  extern __shared__ __align__(16) unsigned char shared[];
  const int num_tokens = p.num_rows, num_inputs = p.num_inputs, num_outputs = p.num_outputs;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int first_token = blockIdx.x * kTokens, first_row = blockIdx.y * kRows;
  const int first_chunk = blockIdx.z * chunks_per_split;
  const int num_steps = min(divideUp(num_inputs, kManyChunk) - first_chunk, chunks_per_split);

  allowNextKernel();
  waitForEarlierKernels();

  const Half* const x = static_cast<const Half*>(p.x);
  const auto copyStep = [&](int step) {
    if (step < num_steps) {
      unsigned char* const stage = shared + step % kStages * kStageBytes;
      const int first_k = (first_chunk + step) * kManyChunk;
#pragma unroll
      for (int i = 0; i < kRows * (kManyChunk / 16) / kThreads; ++i) {
        const int index = threadIdx.x + i * kThreads, row = index / 4, k = first_k + index % 4 * 16;
        const bool valid = first_row + row < num_outputs && k < num_inputs;
        const size_t offset = static_cast<size_t>(first_row + row) * num_inputs + k;
        copyAsync(stage + index * 16, p.weight + (valid ? offset : 0), valid ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < kTokens * (kManyChunk / 8) / kThreads; ++i) {
        const int index = threadIdx.x + i * kThreads, token = index / 8, piece = index % 8, k = first_k + piece * 8;
        const bool valid = first_token + token < num_tokens && k < num_inputs;
        const size_t offset = static_cast<size_t>(first_token + token) * num_inputs + k;
        // 16-byte pieces of odd tokens trade places, so that lanes of two tokens read from all banks.
        copyAsync(stage + kRows * kManyChunk + (token * 8 + (piece ^ (token & 1))) * 16, x + (valid ? offset : 0),
                  valid ? 16 : 0);
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
    const unsigned char* const tokens = stage + kRows * kManyChunk;
    uint32_t words[kRowTiles][4][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const unsigned char* const rows = stage + ((warp * kRowTiles + r) * 16 + g) * kManyChunk + t * 16;
      const uint4 near = *reinterpret_cast<const uint4*>(rows);
      const uint4 far = *reinterpret_cast<const uint4*>(rows + 8 * kManyChunk);
      words[r][0][0] = near.x, words[r][1][0] = near.y, words[r][2][0] = near.z, words[r][3][0] = near.w;
      words[r][0][1] = far.x, words[r][1][1] = far.y, words[r][2][1] = far.z, words[r][3][1] = far.w;
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {  // two k16 tiles, whose share of a token is one 16-byte piece
      uint32_t a[kRowTiles][2][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          dequantise(words[r][2 * pair + s][0], a[r][s][0], a[r][s][2], Half{});
          dequantise(words[r][2 * pair + s][1], a[r][s][1], a[r][s][3], Half{});
        }
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = 8 * j + g;
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

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int output = first_row + (warp * kRowTiles + r) * 16 + g + i * 8;
      if (output >= num_outputs) continue;
      const Output<Half> finish(p, output);
#pragma unroll
      for (int j = 0; j < 2 * kTokenTiles; ++j) {
        const int token = first_token + j / 2 * 8 + 2 * t + j % 2;
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
template <typename Half>
__global__ void __launch_bounds__(kSumThreads) sumSplits(const Int8LinearParams p, const float* partial, int num_splits) {
  allowNextKernel();
  waitForEarlierKernels();
  const size_t count = static_cast<size_t>(p.num_rows) * p.num_outputs;
  const size_t i = static_cast<size_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  float total = 0.0f;
#pragma unroll 4
  for (int s = 0; s < num_splits; ++s) total += partial[s * count + i];
  static_cast<Half*>(p.y)[i] = Output<Half>(p, static_cast<int>(i % p.num_outputs))(total);
}

// --- launches ---

struct Device {
  bool overlaps = false;  // a kernel can be placed before the one that it waits for has ended
  int shared_bytes = 0;   // that a block can have
};

cudaError_t describeDevice(Device& device) {
  int index = 0, major = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
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
#if CUDART_VERSION >= 12030
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = device.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
#else
  (void)device;
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
#endif
}

template <typename Half, int kRowTiles, int kTokenTiles, int kWarps, int kStages>
cudaError_t launchFew(const Int8LinearParams& p, int prefetch_bytes, const Device& device, cudaStream_t stream) {
  const int ring_bytes = kWarps * fewStageBytes(kRowTiles, p.num_rows);
  const dim3 grid(divideUp(p.num_outputs, 16 * kRowTiles));
  if constexpr (kStages > 2) {  // a smaller device: less on its way
    if (ring_bytes * kStages > device.shared_bytes) {
      return launchFew<Half, kRowTiles, kTokenTiles, kWarps, kStages - 1>(p, prefetch_bytes, device, stream);
    }
  }
  return launch(fewTokens<Half, kRowTiles, kTokenTiles, kWarps, kStages>, grid, kWarps * kWarpSize,
                ring_bytes * kStages, device, stream, p, prefetch_bytes);
}

// How many tiles and splits of k a product of more than 16 tokens has; of shapes alone.
struct ManyPlan {
  int row_tiles, token_tiles;
  dim3 grid;
  int chunks_per_split;
  size_t partialBytes(const Int8LinearParams& p) const {
    return grid.z > 1 ? sizeof(float) * grid.z * p.num_rows * p.num_outputs : 0;
  }
};

ManyPlan planMany(const Int8LinearParams& p, int row_tiles, int token_tiles, int wanted_blocks) {
  constexpr int kLeastChunks = 8;  // of a split, for its first copies not to be all of it
  ManyPlan plan{row_tiles, token_tiles, dim3(), 0};
  plan.grid.x = divideUp(p.num_rows, 8 * token_tiles);
  plan.grid.y = divideUp(p.num_outputs, kManyWarps * 16 * row_tiles);
  const int num_chunks = divideUp(p.num_inputs, kManyChunk);
  const int tiles = plan.grid.x * plan.grid.y;
  const int splits = std::max(1, std::min(wanted_blocks / tiles, num_chunks / kLeastChunks));
  plan.chunks_per_split = divideUp(num_chunks, splits);
  plan.grid.z = divideUp(num_chunks, plan.chunks_per_split);
  return plan;
}

template <typename Half, int kRowTiles, int kTokenTiles, int kStages>
cudaError_t launchMany(const Int8LinearParams& p, const ManyPlan& plan, void* workspace, const Device& device,
                       cudaStream_t stream) {
  float* const partial = plan.grid.z > 1 ? static_cast<float*>(workspace) : nullptr;
  const cudaError_t error =
      launch(manyTokens<Half, kRowTiles, kTokenTiles, kStages>, plan.grid, kManyWarps * kWarpSize,
             kStages * manyStageBytes(kRowTiles, kTokenTiles), device, stream, p, partial, plan.chunks_per_split);
  if (error != cudaSuccess || !partial) return error;
  const size_t count = static_cast<size_t>(p.num_rows) * p.num_outputs;
  const dim3 grid(static_cast<unsigned>((count + kSumThreads - 1) / kSumThreads));
  return launch(sumSplits<Half>, grid, kSumThreads, 0, device, stream, p, partial, static_cast<int>(plan.grid.z));
}

ManyPlan planMany(const Int8LinearParams& p) {
  constexpr int kWantedBlocks = 512;
  return planMany(p, 2, p.num_rows <= 32 ? 4 : 8, kWantedBlocks);
}

template <typename Half>
cudaError_t launchTyped(const Int8LinearParams& p, void* workspace, const Device& device, cudaStream_t stream) {
  constexpr int kPrefetchBytes = 4096;  // of each weight row, while the kernel before this one runs
  if (p.num_rows <= 4) return launchFew<Half, 1, 1, 8, 4>(p, kPrefetchBytes, device, stream);
  if (p.num_rows <= 8) return launchFew<Half, 2, 1, 4, 4>(p, kPrefetchBytes, device, stream);
  if (p.num_rows <= kFewTokens) return launchFew<Half, 2, 2, 4, 3>(p, kPrefetchBytes, device, stream);
  const ManyPlan plan = planMany(p);
  return plan.token_tiles == 4 ? launchMany<Half, 2, 4, 4>(p, plan, workspace, device, stream)
                               : launchMany<Half, 2, 8, 4>(p, plan, workspace, device, stream);
}

// --- checks ---

struct Range {
  const char* name;
  const void* data;
  size_t bytes;
  size_t address() const { return reinterpret_cast<size_t>(data); }
};

template <typename... Values>
const char* explain(const char* format, Values... values) {
  thread_local char text[160];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

}  // namespace
}  // namespace int8_linear

using namespace int8_linear;

size_t int8LinearWorkspaceBytes(const Int8LinearParams& params) {
  if (params.num_rows <= kFewTokens || params.num_inputs < 1 || params.num_outputs < 1) return 0;
  return planMany(params).partialBytes(params);
}

const char* int8LinearProblem(const Int8LinearParams& p) {
  if (p.num_rows < 1 || p.num_rows > kMaxTokens) {
    return explain("num_rows: received %d, expected 1 .. %d", p.num_rows, kMaxTokens);
  }
  if (p.num_inputs < 16 || p.num_inputs > kMaxFeatures || p.num_inputs % 16) {
    return explain("num_inputs: received %d, expected a multiple of 16 in 16 .. %d; pad x and weight with zeros",
                   p.num_inputs, kMaxFeatures);
  }
  if (p.num_outputs < 1 || p.num_outputs > kMaxFeatures) {
    return explain("num_outputs: received %d, expected 1 .. %d", p.num_outputs, kMaxFeatures);
  }
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    return explain("dtype: received %d, expected 0 (float16) or 1 (bfloat16)", static_cast<int>(p.dtype));
  }
  const size_t rows = p.num_rows, inputs = p.num_inputs, outputs = p.num_outputs;
  const Range ranges[] = {{"y", p.y, rows * outputs * 2},
                          {"x", p.x, rows * inputs * 2},
                          {"weight", p.weight, outputs * inputs},
                          {"scale", p.scale, outputs * sizeof(float)},
                          {"bias", p.bias, outputs * 2}};
  for (const Range& range : ranges) {
    if (!range.data && range.data != p.bias) {
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

cudaError_t launchInt8Linear(const Int8LinearParams& params, void* workspace, cudaStream_t stream) {
  if (int8LinearProblem(params)) return cudaErrorInvalidValue;
  if (int8LinearWorkspaceBytes(params) && (!workspace || reinterpret_cast<size_t>(workspace) % 16)) {
    return cudaErrorInvalidValue;
  }
  Device device;
  const cudaError_t error = describeDevice(device);
  if (error != cudaSuccess) return error;
  return params.dtype == DType::kFloat16 ? launchTyped<__half>(params, workspace, device, stream)
                                         : launchTyped<__nv_bfloat16>(params, workspace, device, stream);
}

}  // namespace sinkexport
