// Blocks in a row that share their shared memories (thread block clusters, compute capability 9.0 and above).
#pragma once

#include <cstdint>

namespace sinkexport {

// Of this block in its cluster.
__device__ __forceinline__ int clusterRank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// All threads of all blocks of the cluster: what they wrote to shared memory before is seen after it.
__device__ __forceinline__ void syncCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What block `rank` of the cluster has where `shared` is here.
__device__ __forceinline__ float readOfBlock([[maybe_unused]] const float* shared, [[maybe_unused]] int rank) {
  float value = 0.0f;
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

}  // namespace sinkexport
