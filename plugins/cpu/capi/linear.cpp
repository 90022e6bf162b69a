#include "linear.h"

#include "interface.h"

using namespace sinkexport::cpu;

namespace {

const char* problemOfLinear(const LinearParams& params) {
  return linearProblem(params);
}
const char* problemOfRows(const RowsParams& params) {
  return rowsProblem(params);
}

void callLinear(const LinearParams& params, Isa isa, const Parallel& parallel, Scratch& scratch) {
  linearFor(isa)(params, parallel, scratch);
}

void callRows(const RowsParams& params, Isa, const Parallel& parallel, Scratch&) {
  runRows(params, parallel);
}

}  // namespace

SINKEXPORT_CPU_KERNEL(linear, LinearParams, problemOfLinear, callLinear)
SINKEXPORT_CPU_KERNEL(rows, RowsParams, problemOfRows, callRows)
