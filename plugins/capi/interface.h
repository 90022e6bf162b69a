// The C interface of a kernel, to be called through ctypes. NAME is the kernel's, and the struct of its parameters is
// passed by pointer:
//
//   size_t sinkexport_NAME_params_bytes()           of the struct, for a caller to check its own declaration
//   const char* sinkexport_NAME_problem(params)     null, or one line that is valid until this thread's next call
//   int sinkexport_NAME(params, stream)             a cudaError_t
//
// and where a launch needs scratch
//
//   size_t sinkexport_NAME_workspace_bytes(params)
//   int sinkexport_NAME(params, workspace, stream)
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

#define SINKEXPORT_PARAMS(name, Params, findProblem)                             \
  SINKEXPORT_API size_t sinkexport_##name##_params_bytes() {                     \
    return sizeof(Params);                                                       \
  }                                                                              \
  SINKEXPORT_API const char* sinkexport_##name##_problem(const Params* params) { \
    return findProblem(*params);                                                 \
  }

#define SINKEXPORT_KERNEL(name, Params, findProblem, launch)                        \
  SINKEXPORT_PARAMS(name, Params, findProblem)                                      \
  SINKEXPORT_API int sinkexport_##name(const Params* params, cudaStream_t stream) { \
    return launch(*params, stream);                                                 \
  }

#define SINKEXPORT_KERNEL_WITH_WORKSPACE(name, Params, findProblem, workspaceBytes, launch)          \
  SINKEXPORT_PARAMS(name, Params, findProblem)                                                       \
  SINKEXPORT_API size_t sinkexport_##name##_workspace_bytes(const Params* params) {                  \
    return workspaceBytes(*params);                                                                  \
  }                                                                                                  \
  SINKEXPORT_API int sinkexport_##name(const Params* params, void* workspace, cudaStream_t stream) { \
    return launch(*params, workspace, stream);                                                       \
  }
