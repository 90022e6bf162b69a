// Kernels that start while the one before them in the stream still runs (programmatic dependent launch, compute
// capability 9.0 and above).
#pragma once

#include <cuda_runtime.h>

namespace sinkexport {

// Nothing that earlier work in the stream writes may be read, and nothing that it reads may be written, before this.
__device__ __forceinline__ void waitForEarlierKernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may be placed beside this one's, if it was launched so and begins with the wait above.
__device__ __forceinline__ void allowNextKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Brings a line of 128 bytes that this kernel will read nearer. Any line, also before the wait: the copy is in the L2
// cache, where every write arrives.
__device__ __forceinline__ void prefetchLine([[maybe_unused]] const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Whether the current device can place a kernel before the one that it waits for has ended.
inline cudaError_t findOverlap(bool& overlaps) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  overlaps = major >= 9;
  return error;
}

// `overlaps`: the kernel waits by itself for all work that is ahead of it in the stream. arguments: addresses of the
// kernel's parameters, as cudaLaunchKernel takes them. Graphs are captured with such launches from CUDA 12.3 on.
// cluster_blocks: of a cluster, along y; only where kernels overlap.
inline cudaError_t launchOverlapping(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, bool overlaps,
                                     cudaStream_t stream, void** arguments, [[maybe_unused]] int cluster_blocks = 1) {
#if CUDART_VERSION >= 12030
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {1, static_cast<unsigned>(cluster_blocks), 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !overlaps ? 0 : cluster_blocks > 1 ? 2 : 1;
  return cudaLaunchKernelExC(&config, kernel, arguments);
#else
  (void)overlaps;
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
#endif
}

template <typename... Parameters, typename... Arguments>
cudaError_t launchOverlapping(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, bool overlaps,
                              cudaStream_t stream, Arguments... arguments) {
  const auto launch = [&](Parameters... parameters) {
    void* addresses[] = {static_cast<void*>(&parameters)...};
    return launchOverlapping(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, overlaps, stream,
                             addresses);
  };
  return launch(Parameters(arguments)...);
}

}  // namespace sinkexport
