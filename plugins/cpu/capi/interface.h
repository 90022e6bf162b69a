// The C interface of a kernel, to be called through ctypes or by replay/main.cpp:
//
//   size_t sinkexport_cpu_NAME_params_bytes()             of the struct, for a caller to check its own declaration
//   const char* sinkexport_cpu_NAME_problem(params)       null, or one line that is valid until this thread's next call
//   void sinkexport_cpu_NAME(params, isa, threads)        runs it; isa as Isa's number, which hasIsa() must say yes to
#pragma once

#include <cstddef>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "spin_pool.h"

#define SINKEXPORT_API extern "C" __attribute__((visibility("default")))

// call(const Params&, Isa, const Parallel&, Scratch&)
#define SINKEXPORT_CPU_KERNEL(name, Params, findProblem, call)                            \
  SINKEXPORT_API size_t sinkexport_cpu_##name##_params_bytes() {                          \
    return sizeof(Params);                                                                \
  }                                                                                       \
  SINKEXPORT_API const char* sinkexport_cpu_##name##_problem(const Params* params) {      \
    return findProblem(*params);                                                          \
  }                                                                                       \
  SINKEXPORT_API void sinkexport_cpu_##name(const Params* params, int isa, int threads) { \
    sinkexport::cpu::SpinPool pool(threads);                                              \
    sinkexport::cpu::Scratch scratch;                                                     \
    call(*params, static_cast<sinkexport::cpu::Isa>(isa), pool.parallel(), scratch);      \
  }
