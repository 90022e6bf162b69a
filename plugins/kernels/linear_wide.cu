// Matmuls of many tokens on GPUs of compute capability 9.0, by matrix instructions of whole warpgroups: what is decided
// on the host. The kernel: linear_wide.cuh.
//
// Compiled for sm_90a; for all other architectures the kernels are empty, and have no static shared memory.
#include "linear_wide.h"

#include <algorithm>

#include "linear_wide.cuh"

namespace sinkexport {
namespace linear {
namespace {

// --- the plan, by shapes alone ---

constexpr int kWideMultiprocessors = 132;  // of an H100 or H200
constexpr int kMostSplits = 4;

struct WideChoice {
  WidePlan plan;
  int tokens;  // of a tile
  float cost;
};

// What tiles of so many tokens with so many splits take, in stages of 256 tokens (0.6 us). Numbers: fitted to times on
// an H200 (plugins/README.md).
WideChoice costOf(const LinearParams& p, int tokens, int splits) {
  constexpr float kTileEnds = 2.0f, kSecondKernel = 8.0f, kBytesInAStage = 2.6e6f;
  const float few = p.weight_type == WeightType::kHalf ? 0.56f : p.weight_type == WeightType::kInt8 ? 0.62f : 0.74f;
  WidePlan plan;
  plan.token_tiles = divideUp(p.num_rows, tokens);
  plan.row_pairs = divideUp(p.num_outputs, kWideCluster * kWideWarpgroups * kWideRows);
  plan.num_steps = divideUp(p.num_inputs, kManyChunk);
  plan.steps_per_split = divideUp(plan.num_steps, splits);
  plan.splits = divideUp(plan.num_steps, plan.steps_per_split);
  const int rounds = divideUp(plan.numTiles(), kWideMultiprocessors / kWideCluster);
  float cost = rounds * (plan.steps_per_split * (tokens == 256 ? 1.0f : few) + kTileEnds);
  if (plan.splits > 1) {
    cost += kSecondKernel + 8.0f * plan.splits * p.num_rows * p.num_outputs / kBytesInAStage;
  }
  return {plan, tokens, cost};
}

WideChoice planWide(const LinearParams& p) {
  WideChoice best = costOf(p, 256, 1);
  for (int tokens : {256, 128}) {
    for (int splits = 1; splits <= (p.is_gated ? 1 : kMostSplits); ++splits) {
      const WideChoice one = costOf(p, tokens, splits);
      if (one.cost < best.cost) best = one;
    }
  }
  return best;
}

// --- tensor maps ---

#if CUDART_VERSION >= 12050
cudaError_t findEncoder(void** function, cudaDriverEntryPointQueryResult& found) {
  return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", function, 12000, cudaEnableDefault, &found);
}
#else
cudaError_t findEncoder(void** function, cudaDriverEntryPointQueryResult& found) {
  return cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", function, cudaEnableDefault, &found);
}
#endif

using Encoder = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking the driver; null: it has none.
Encoder encoder() {
  static const Encoder known = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const bool ok = findEncoder(&function, found) == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<Encoder>(function) : nullptr;
  }();
  return known;
}

constexpr int kMapAxes = 4;

// Of `kAxes`, the first without gaps; strides: bytes of the others. What is outside of the tensor is read as zeros.
struct TensorTiles {
  CUtensorMapDataType type;
  const void* data;
  cuuint32_t axes;
  cuuint64_t sizes[kMapAxes], strides[kMapAxes - 1];
  cuuint32_t box[kMapAxes];
  CUtensorMapSwizzle swizzle;
};

bool encode(CUtensorMap& map, const TensorTiles& tiles) {
  const cuuint32_t ones[kMapAxes] = {1, 1, 1, 1};
  return encoder()(&map, tiles.type, tiles.axes, const_cast<void*>(tiles.data), tiles.sizes, tiles.strides, tiles.box,
                   ones, CU_TENSOR_MAP_INTERLEAVE_NONE, tiles.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

constexpr int kWideBlockRows = kWideWarpgroups * kWideRows;

// Tiles of gate and up in turn, if there is a gate.
bool encodeInt4(WideMaps& maps, const LinearParams& p) {
  const Int4Sizes sizes(p);
  const cuuint64_t halves = p.is_gated ? 2 : 1, tiles = sizes.num_tiles / halves;
  const auto map = [&](CUtensorMap& to, const void* data, cuuint64_t row, cuuint64_t rows, int rows_of_stage,
                       CUtensorMapSwizzle swizzle) {  // row: bytes; rows: of a tile
    const TensorTiles one = {
        CU_TENSOR_MAP_DATA_TYPE_UINT32,
        data,
        4,
        {row / 4, rows, halves, tiles},
        {row, row * rows * tiles, row * rows},
        {static_cast<cuuint32_t>(row / 4), static_cast<cuuint32_t>(rows_of_stage), static_cast<cuuint32_t>(halves),
         static_cast<cuuint32_t>(kWideBlockRows / kInt4TileOutputs / halves)},
        swizzle};
    return encode(to, one);
  };
  const auto steps = static_cast<cuuint64_t>(sizes.num_steps), groups = static_cast<cuuint64_t>(sizes.num_groups);
  const int groups_of_stage = p.block_size < kInt4TileInputs ? 2 : 1;
  constexpr auto kPlain = CU_TENSOR_MAP_SWIZZLE_NONE;
  return map(maps.weight, p.weight, 64, 8 * steps, 8, CU_TENSOR_MAP_SWIZZLE_64B) &&
         map(maps.scales, p.block_scale, kInt4ScaleBytes, groups, groups_of_stage, kPlain) &&
         (!p.zero_points || map(maps.zeros, p.zero_points, kInt4TileOutputs, groups, groups_of_stage, kPlain));
}

bool encodeAll(WideMaps& maps, const LinearParams& p, int tokens) {
  constexpr auto kHalves = CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const auto inputs = static_cast<cuuint64_t>(p.num_inputs), outputs = static_cast<cuuint64_t>(p.num_outputs);
  const TensorTiles x = {kHalves,
                         p.x,
                         2,
                         {inputs, static_cast<cuuint64_t>(p.num_rows), 1, 1},
                         {2 * inputs, 0, 0},
                         {kManyChunk, static_cast<cuuint32_t>(tokens) / kWideCluster, 1, 1},
                         CU_TENSOR_MAP_SWIZZLE_128B};
  if (!encode(maps.x, x)) return false;
  if (p.weight_type == WeightType::kInt4) return encodeInt4(maps, p);
  const bool is_int8 = p.weight_type == WeightType::kInt8;
  const cuuint64_t row = inputs * (is_int8 ? 1 : 2);  // bytes
  TensorTiles weight = {is_int8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : kHalves,
                        p.weight,
                        4,
                        {inputs, outputs, 1, 1},
                        {row, row * outputs, row * outputs},
                        {kManyChunk, kWideBlockRows, 1, 1},
                        is_int8 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B};
  if (p.is_gated) {  // eights of gate and up in turn
    const TensorTiles in_turn = {weight.type,
                                 p.weight,
                                 4,
                                 {inputs, 8, 2, outputs / 16},
                                 {row, row * outputs / 2, 8 * row},
                                 {kManyChunk, 8, 2, kWideBlockRows / 16},
                                 weight.swizzle};
    weight = in_turn;
  }
  return encode(maps.weight, weight);
}

// --- launches ---

// Whether what was compiled has the kernel's code for this device.
template <typename Kernel>
bool hasCode(Kernel kernel) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess) {
    return attributes.sharedSizeBytes > 0;
  }
  cudaGetLastError();  // no code at all, not even empty
  return false;
}

// y from the sums of all splits.
template <typename Weight, typename Half>
cudaError_t sumPartial(const LinearParams& p, const float* partial, int splits, const Device& device,
                       cudaStream_t stream) {
  const size_t count = static_cast<size_t>(p.num_rows) * p.num_outputs;
  const dim3 grid(static_cast<unsigned>((count + kSumThreads - 1) / kSumThreads));
  return launch(sumSplits<Weight, Half>, grid, kSumThreads, 0, device, stream, p, partial, splits);
}

template <typename Shape>
cudaError_t launchShape(const LinearParams& p, const WidePlan& plan, void* workspace, const Device& device,
                        cudaStream_t stream, bool& launched) {
  constexpr auto kernel = wideTokens<Shape>;
  WideMaps maps{};
  launched =
      device.shared_bytes >= Shape::kSharedBytes && hasCode(kernel) && encoder() && encodeAll(maps, p, Shape::kTokens);
  if (!launched) return cudaSuccess;
  float* const partial = plan.splits > 1 ? static_cast<float*>(workspace) : nullptr;
  const int clusters = std::min(plan.numTiles(), device.multiprocessors / kWideCluster);
  const cudaError_t error = launch(kernel, dim3(clusters * kWideCluster), kWideThreads, Shape::kSharedBytes, device,
                                   stream, maps, p, plan, partial);
  if (error != cudaSuccess || !partial) return error;
  return sumPartial<typename Shape::Weight, typename Shape::Half>(p, partial, plan.splits, device, stream);
}

template <typename Half>
cudaError_t launchTyped(const LinearParams& p, void* workspace, const Device& device, cudaStream_t stream,
                        bool& launched) {
  const WideChoice choice = planWide(p);
  return withWeight<Half>(p.weight_type, [&](auto weight) {
    using Weight = decltype(weight);
    return choice.tokens == 256
               ? launchShape<WideShape<Weight, Half, 256>>(p, choice.plan, workspace, device, stream, launched)
               : launchShape<WideShape<Weight, Half, 128>>(p, choice.plan, workspace, device, stream, launched);
  });
}

}  // namespace

// M N K from which on these take less time than linear_many.cuh's: on an H200 (plugins/README.md). Tests say 1.
#ifndef SINKEXPORT_WIDE_PRODUCTS
#define SINKEXPORT_WIDE_PRODUCTS 400000000
#endif
constexpr size_t kWideProducts = SINKEXPORT_WIDE_PRODUCTS;
constexpr int kWideTokens = 65;

bool takesWide(const LinearParams& p) {
  const size_t products = static_cast<size_t>(p.num_rows) * p.num_outputs * p.num_inputs;
  if (p.num_rows < kWideTokens || products < kWideProducts) return false;
  return !p.is_gated || p.activation != Activation::kGelu;
}

size_t wideWorkspaceBytes(const LinearParams& p) {
  const int splits = planWide(p).plan.splits;
  return splits > 1 ? sizeof(float) * splits * p.num_rows * p.num_outputs : 0;
}

cudaError_t launchWide(const LinearParams& p, void* workspace, const Device& device, cudaStream_t stream,
                       bool& launched) {
  return p.dtype == DType::kFloat16 ? launchTyped<__half>(p, workspace, device, stream, launched)
                                    : launchTyped<__nv_bfloat16>(p, workspace, device, stream, launched);
}

}  // namespace linear
}  // namespace sinkexport
