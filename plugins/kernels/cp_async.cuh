// Copies from device to shared memory in the background. Below compute capability 8.0 they are done on the spot.
#pragma once

#include <cstdint>

namespace sinkexport {

// 16 bytes: the first num_bytes of them from `global`, the rest zeros. Both addresses are multiples of 16, and `global`
// may be read even if num_bytes is 0.
__device__ __forceinline__ void copyAsync(void* shared, const void* global, int num_bytes) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(num_bytes)
               : "memory");
#else
  auto* to = static_cast<uint16_t*>(shared);
  const auto* from = static_cast<const uint16_t*>(global);
  for (int i = 0; i < 8; ++i) to[i] = 2 * i < num_bytes ? from[i] : uint16_t{0};
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies until at most kPending groups are on their way. Others' copies: a barrier after it.
template <int kPending>
__device__ __forceinline__ void waitForCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace sinkexport
