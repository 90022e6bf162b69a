// rms_norm.h for ctypes. The struct is passed by pointer; its size lets the caller check its own declaration of it.
#include "rms_norm.h"

#include <cstddef>

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

using sinkexport::RmsNormParams;

SINKEXPORT_API size_t sinkexport_rms_norm_params_bytes() {
  return sizeof(RmsNormParams);
}

// Null, or one line that is valid until this thread's next call.
SINKEXPORT_API const char* sinkexport_rms_norm_problem(const RmsNormParams* params) {
  return sinkexport::rmsNormProblem(*params);
}

// A cudaError_t.
SINKEXPORT_API int sinkexport_rms_norm(const RmsNormParams* params, cudaStream_t stream) {
  return sinkexport::launchRmsNorm(*params, stream);
}
