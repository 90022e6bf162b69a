// expert_linear.h for ctypes. The struct is passed by pointer; its size lets the caller check its own declaration of
// it.
#include "expert_linear.h"

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

using sinkexport::ExpertLinearParams;

SINKEXPORT_API size_t sinkexport_expert_linear_params_bytes() {
  return sizeof(ExpertLinearParams);
}

// Null, or one line that is valid until this thread's next call.
SINKEXPORT_API const char* sinkexport_expert_linear_problem(const ExpertLinearParams* params) {
  return sinkexport::expertLinearProblem(*params);
}

// A cudaError_t.
SINKEXPORT_API int sinkexport_expert_linear(const ExpertLinearParams* params, cudaStream_t stream) {
  return sinkexport::launchExpertLinear(*params, stream);
}
