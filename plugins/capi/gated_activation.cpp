// gated_activation.h for ctypes. The struct is passed by pointer; its size lets the caller check its own declaration of
// it.
#include "gated_activation.h"

#include <cstddef>

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

using sinkexport::GatedActivationParams;

SINKEXPORT_API size_t sinkexport_gated_activation_params_bytes() {
  return sizeof(GatedActivationParams);
}

// Null, or one line that is valid until this thread's next call.
SINKEXPORT_API const char* sinkexport_gated_activation_problem(const GatedActivationParams* params) {
  return sinkexport::gatedActivationProblem(*params);
}

// A cudaError_t.
SINKEXPORT_API int sinkexport_gated_activation(const GatedActivationParams* params, cudaStream_t stream) {
  return sinkexport::launchGatedActivation(*params, stream);
}
