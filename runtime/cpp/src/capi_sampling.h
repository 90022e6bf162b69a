// Generated from runtime/sinkrt/contract by runtime/cpp/tools/make_manifest.py (`make generated`).
#pragma once

#include "sinkrt/sampling.h"
#include "sinkrt/sinkrt.h"

namespace sinkrt {

// Options of the C interface. Zero is the default of each.
inline SamplingParams samplingParams(const sinkrt_sampling& given) {
  SamplingParams out;
  out.temperature = given.temperature;
  out.top_k = given.top_k;
  out.top_p = given.top_p == 0 ? 1.0 : given.top_p;
  out.repetition_penalty = given.repetition_penalty == 0 ? 1.0 : given.repetition_penalty;
  out.seed = given.seed;
  return out;
}

}  // namespace sinkrt
