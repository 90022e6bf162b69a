// What products by constant matrices are made of: asynchronous copies, weights as factors, one tensor-core product,
// what makes an output of a sum, launches.
#pragma once

#include <cstdint>
#include <type_traits>

#include "halves.cuh"
#include "linear.h"
#include "overlap.cuh"
#include "problem.h"

namespace sinkexport {
namespace linear {

constexpr int kWarpSize = 32;

__host__ __device__ constexpr int divideUp(int a, int b) {
  return (a + b - 1) / b;
}

// --- asynchronous copies of 16 bytes from device to shared memory ---

// `size` 16, or 0: zeros are written and nothing is read. Below compute capability 8.0 the copy is done on the spot.
__device__ __forceinline__ void copyAsync(void* shared, const void* global, int size) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(size)
               : "memory");
#else
  *static_cast<uint4*>(shared) = size ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}

__device__ __forceinline__ void commitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies until at most kGroups groups are on their way. Others' copies: a barrier after it.
template <int kGroups>
__device__ __forceinline__ void waitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// --- halves ---

// 4 INT8 in a word, first in the lowest byte, to two registers of two halves each: exact, bytes placed in mantissas.
__device__ __forceinline__ void dequantise(uint32_t word, uint32_t& low, uint32_t& high, __half) {
  const uint32_t raised = word ^ 0x80808080u;  // w + 128, unsigned
  const uint32_t offset = 0x64806480u;         // 1024 + 128; 0x64uu is 1024 + u
  const uint32_t a = __byte_perm(raised, 0x64646464u, 0x4140), b = __byte_perm(raised, 0x64646464u, 0x4342);
  const __half2 c = __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(offset));
  const __half2 d = __hsub2(reinterpret_cast<const __half2&>(b), reinterpret_cast<const __half2&>(offset));
  low = reinterpret_cast<const uint32_t&>(c);
  high = reinterpret_cast<const uint32_t&>(d);
}

// bfloat16's mantissa holds 7 bits of the 8: 0x43uu is 128 + u below 128 and 256 at 128, so that w is the difference of
// the two that have its lower bits and its sign.
__device__ __forceinline__ void dequantise(uint32_t word, uint32_t& low, uint32_t& high, __nv_bfloat16) {
  const uint32_t bits = word & 0x7f7f7f7fu, sign = word & 0x80808080u;
  const uint32_t a = __byte_perm(bits, 0x43434343u, 0x4140), b = __byte_perm(sign, 0x43434343u, 0x4140);
  const uint32_t c = __byte_perm(bits, 0x43434343u, 0x4342), d = __byte_perm(sign, 0x43434343u, 0x4342);
  using Pair = __nv_bfloat162;
  const Pair e = __hsub2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  const Pair f = __hsub2(reinterpret_cast<const Pair&>(c), reinterpret_cast<const Pair&>(d));
  low = reinterpret_cast<const uint32_t&>(e);
  high = reinterpret_cast<const uint32_t&>(f);
}

template <typename Weight>
constexpr bool kIsInt8 = std::is_same_v<Weight, int8_t>;
template <typename Weight>
constexpr int kUnitWeights = 16 / static_cast<int>(sizeof(Weight));  // of a 16-byte copy

__device__ __forceinline__ uint32_t wordOf(const uint2& words, int i) {
  return i == 0 ? words.x : words.y;
}
__device__ __forceinline__ uint32_t wordOf(const uint4& words, int i) {
  return i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w);
}

// The left factor of product `s` (below): four weights of row g out of `near`, and of row g + 8 out of `far`, which are
// those of a[0], a[2] and of a[1], a[3].
template <typename Weight, typename Half, typename Words>
__device__ __forceinline__ void takeTile(uint32_t (&a)[4], const Words& near, const Words& far, int s) {
  if constexpr (kIsInt8<Weight>) {
    dequantise(wordOf(near, s), a[0], a[2], Half{});
    dequantise(wordOf(far, s), a[1], a[3], Half{});
  } else {
    a[0] = wordOf(near, 2 * s), a[2] = wordOf(near, 2 * s + 1);
    a[1] = wordOf(far, 2 * s), a[3] = wordOf(far, 2 * s + 1);
  }
}

// --- the product ---

// sum += a . b of a [16, 16], b [16, 8]: PTX's mma.m16n8k16. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0]: a[g, 2t ..], a[1]: a[g + 8, 2t ..], a[2]: a[g, 2t + 8 ..], a[3]: a[g + 8, 2t + 8 ..]   (two halves each)
//   b0: b[2t .., g], b1: b[2t + 8 .., g]
//   sum[0], sum[1]: sum[g, 2t ..], sum[2], sum[3]: sum[g + 8, 2t ..]
#if __CUDA_ARCH__ >= 800 && !defined(SINKEXPORT_NO_MMA)
template <typename Half>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Half, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
#else
template <typename Half>
__device__ __forceinline__ float2 toFloats(uint32_t pair) {
  const Half* halves = reinterpret_cast<const Half*>(&pair);
  return {toFloat(halves[0]), toFloat(halves[1])};
}

// Below compute capability 8.0 there is no such instruction: the same sums by exchange within the warp, not as fast.
// SINKEXPORT_NO_MMA lets any GPU take this way, for tests.
template <typename Half>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr uint32_t kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarpSize, row = lane / 4 * 4, column = lane % 4 * 2;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    float2 factors[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) factors[i] = toFloats<Half>(__shfl_sync(kAll, a[i], row + t));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 near = toFloats<Half>(__shfl_sync(kAll, b0, (column + i) * 4 + t));
      const float2 far = toFloats<Half>(__shfl_sync(kAll, b1, (column + i) * 4 + t));
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // rows g and g + 8
        float& total = sum[2 * j + i];
        total = fmaf(factors[j].x, near.x, fmaf(factors[j].y, near.y, total));
        total = fmaf(factors[2 + j].x, far.x, fmaf(factors[2 + j].y, far.y, total));
      }
    }
  }
}
#endif

// What makes an output of a sum.
template <typename Weight, typename Half>
struct Output {
  float scale, bias;
  __device__ __forceinline__ Output(const LinearParams& p, size_t output)
      : scale(kIsInt8<Weight> ? p.scale[output] : 1.0f),
        bias(p.bias ? toFloat(static_cast<const Half*>(p.bias)[output]) : 0.0f) {}
  __device__ __forceinline__ Half operator()(float sum) const {
    return fromFloat<Half>(kIsInt8<Weight> ? fmaf(sum, scale, bias) : sum + bias);
  }
};

// --- launches ---

struct Device {
  bool overlaps = false;  // a kernel can be placed before the one that it waits for has ended
  int multiprocessors = 0;
  int shared_bytes = 0;         // that a block can have
  int shared_bytes_of_all = 0;  // that all blocks on a multiprocessor have
};

constexpr int kReservedSharedBytes = 1024;  // of each block, by the system

inline cudaError_t describeDevice(Device& device) {
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

// --- checks ---

// nullptr, or one line.
inline const char* weightProblem(WeightType type, int num_inputs, int num_outputs) {
  constexpr int kMaxFeatures = 1 << 21;
  if (type != WeightType::kInt8 && type != WeightType::kHalf) {
    return explain("weight_type: received %d, expected 0 (int8) or 1 (half)", static_cast<int>(type));
  }
  const int unit = type == WeightType::kInt8 ? kUnitWeights<int8_t> : kUnitWeights<__half>;
  if (num_inputs < unit || num_inputs > kMaxFeatures || num_inputs % unit) {
    return explain("num_inputs: received %d, expected a multiple of %d in %d .. %d; pad x and weight with zeros",
                   num_inputs, unit, unit, kMaxFeatures);
  }
  if (num_outputs < 1 || num_outputs > kMaxFeatures) {
    return explain("num_outputs: received %d, expected 1 .. %d", num_outputs, kMaxFeatures);
  }
  return nullptr;
}

}  // namespace linear
}  // namespace sinkexport
