// Blocks of a cluster: they run at the same time and write to each other's shared memory (compute capability 9.0 and
// above).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sinkexport {

// The two halves of a barrier of all threads of the cluster: what was written to shared memory before the first is seen
// after the second.
__device__ __forceinline__ void arriveAtCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void waitForCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// To where `shared` points to in a block of the cluster; that block must have started.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t addressInBlock(const void* shared, int block) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
  return address;
}
#endif

__device__ __forceinline__ void storeInBlock([[maybe_unused]] float4* shared, [[maybe_unused]] int block,
                                             [[maybe_unused]] float4 x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(addressInBlock(shared, block)), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
#endif
}

__device__ __forceinline__ void storeInBlock([[maybe_unused]] float2* shared, [[maybe_unused]] int block,
                                             [[maybe_unused]] float2 x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(addressInBlock(shared, block)), "f"(x.x), "f"(x.y)
               : "memory");
#endif
}

}  // namespace sinkexport
