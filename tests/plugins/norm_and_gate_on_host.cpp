// The kernels of norms and gates on the host, behind the C interface that capi/ has: pointers are the host's.
#include "block_on_host.h"

#include "../capi/interface.h"
#include "gated_activation.cuh"
#include "rms_norm.cuh"

using namespace sinkexport;

namespace {

template <typename Half, typename Weight>
void runNorm(const RmsNormParams& p) {
  using namespace rms_norm;
  const Block block = blockOf(p);
  const auto kernel = kernelOf<Half, Weight>(block);
  on_host::run(kernel, {gridOf(p, block), 1}, {static_cast<unsigned>(block.threads), static_cast<unsigned>(block.rows)},
               p);
}

template <typename Half>
void runNorm(const RmsNormParams& p) {
  p.float_weight ? runNorm<Half, float>(p) : runNorm<Half, Half>(p);
}

template <typename Half>
void runGate(const GatedActivationParams& p) {
  using namespace gated_activation;
  on_host::run(kernelOf<Half>(p.activation), {static_cast<unsigned>(p.num_rows), blocksOf(p)}, {kThreads, 1}, p);
}

const char* noProblem(const RmsNormParams&) {
  return nullptr;
}
const char* noProblem(const GatedActivationParams&) {
  return nullptr;
}

int launchNorm(const RmsNormParams& p, cudaStream_t) {
  p.dtype == DType::kFloat16 ? runNorm<__half>(p) : runNorm<__nv_bfloat16>(p);
  return 0;
}
int launchGate(const GatedActivationParams& p, cudaStream_t) {
  p.dtype == DType::kFloat16 ? runGate<__half>(p) : runGate<__nv_bfloat16>(p);
  return 0;
}

}  // namespace

SINKEXPORT_KERNEL(rms_norm, RmsNormParams, noProblem, launchNorm)
SINKEXPORT_KERNEL(gated_activation, GatedActivationParams, noProblem, launchGate)
