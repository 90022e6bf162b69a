// linear.h for ctypes. The struct is passed by pointer; its size lets the caller check its own declaration of it.
#include "linear.h"

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

using sinkexport::LinearParams;

SINKEXPORT_API size_t sinkexport_linear_params_bytes() {
  return sizeof(LinearParams);
}

SINKEXPORT_API size_t sinkexport_linear_workspace_bytes(const LinearParams* params) {
  return sinkexport::linearWorkspaceBytes(*params);
}

// Null, or one line that is valid until this thread's next call.
SINKEXPORT_API const char* sinkexport_linear_problem(const LinearParams* params) {
  return sinkexport::linearProblem(*params);
}

// A cudaError_t.
SINKEXPORT_API int sinkexport_linear(const LinearParams* params, void* workspace, cudaStream_t stream) {
  return sinkexport::launchLinear(*params, workspace, stream);
}
