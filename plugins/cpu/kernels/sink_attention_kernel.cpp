// Sink attention for one instruction set.
#include "sink_attention_chunk.h"
#include "sink_attention_step.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

extern const AttentionKernels kAttentionKernels;

#ifdef SINKEXPORT_BF16
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif
const AttentionKernels kAttentionKernels = {stepWorker, prepareWorker, chunkWorker, kMaxTileVectors, kHasBf16};

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
