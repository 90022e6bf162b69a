// int8_linear.h for ctypes. The struct is passed by pointer; its size lets the caller check its own declaration of it.
#include "int8_linear.h"

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

using sinkexport::Int8LinearParams;

SINKEXPORT_API size_t sinkexport_int8_linear_params_bytes() { return sizeof(Int8LinearParams); }

SINKEXPORT_API size_t sinkexport_int8_linear_workspace_bytes(const Int8LinearParams* params) {
  return sinkexport::int8LinearWorkspaceBytes(*params);
}

// Null, or one line that is valid until this thread's next call.
SINKEXPORT_API const char* sinkexport_int8_linear_problem(const Int8LinearParams* params) {
  return sinkexport::int8LinearProblem(*params);
}

// A cudaError_t.
SINKEXPORT_API int sinkexport_int8_linear(const Int8LinearParams* params, void* workspace, cudaStream_t stream) {
  return sinkexport::launchInt8Linear(*params, workspace, stream);
}
