#include "sink_attention.h"

#include "interface.h"

using namespace sinkexport::cpu;

namespace {

const char* problemOf(const SinkAttentionParams& params) {
  return sinkAttentionProblem(params);
}

void call(const SinkAttentionParams& params, Isa isa, const Parallel& parallel, Scratch& scratch) {
  sinkAttentionFor(isa)(params, parallel, scratch);
}

}  // namespace

SINKEXPORT_CPU_KERNEL(sink_attention, SinkAttentionParams, problemOf, call)
