#include "sink_attention_kernel.cuh"

namespace sinkexport {
namespace sink_attention {

template AttendKernel attendKernelOf<96>(DType dtype, bool is_int8, int group, bool is_prefill);

}  // namespace sink_attention
}  // namespace sinkexport
