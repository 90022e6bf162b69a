// What launches need to know of the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace sinkexport {

struct Device {
  bool overlaps = false;  // a kernel can be placed before the one that it waits for has ended
  int multiprocessors = 0;
  int shared_bytes = 0;         // that a block can have
  int shared_bytes_of_all = 0;  // that all blocks on a multiprocessor have
};

constexpr int kReservedSharedBytes = 1024;  // of each block, by the system

inline cudaError_t describeDevice(Device& device) {
  int index = 0, major = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&major, cudaDevAttrComputeCapabilityMajor},
                {&device.multiprocessors, cudaDevAttrMultiProcessorCount},
                {&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&device.shared_bytes_of_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor}};
  cudaError_t error = cudaGetDevice(&index);
  for (const auto& one : wanted) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(one.value, one.attribute, index);
  }
  device.overlaps = major >= 9;
  return error;
}

}  // namespace sinkexport
