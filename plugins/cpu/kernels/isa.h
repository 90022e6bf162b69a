// Instruction sets that the kernels are compiled for, and the one that this process uses.
//
// kernels/NAME_kernel.cpp is compiled once for each, in namespace sinkexport::cpu::SINKEXPORT_ISA (simd.h). A table of
// the functions is made by SINKEXPORT_FOR_EACH_ISA in kernels/NAME.cpp:
//
//   #define DECLARE(isa) namespace isa { void runLinear(const LinearParams&, const Parallel&, Scratch&); }
//   SINKEXPORT_FOR_EACH_ISA(DECLARE)
#pragma once

namespace sinkexport::cpu {

enum class Isa : int {
  kPortable = 0,
  kAvx2 = 1,        // with FMA and F16C
  kAvx2Vnni = 2,    // and AVX-VNNI
  kAvx512Vnni = 3,  // F, BW, VL, DQ and VNNI
  kAvx512Bf16 = 4,  // and BF16
  kNeonDot = 5,     // ARMv8.2 with dotprod
  kNeonI8mm = 6,    // and i8mm
};
constexpr int kIsas = 7;

// "portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "neon_dot", "neon_i8mm": also the names of namespaces.
const char* isaName(Isa isa);

// Whether this build has kernels for it and this processor (and its operating system) runs them.
bool hasIsa(Isa isa);

// The best that hasIsa() says yes to.
Isa bestIsa();

// Reads a name, as in the environment variable SINKEXPORT_CPU_ISA; null or empty: the best.
// Returns null and sets `isa`, or one line that says why this name is refused; it lives until this thread asks again.
const char* chooseIsa(const char* name, Isa& isa);

}  // namespace sinkexport::cpu

#ifdef SINKEXPORT_WITH_portable
#define SINKEXPORT_IF_PORTABLE(X) X(portable, Isa::kPortable)
#else
#define SINKEXPORT_IF_PORTABLE(X)
#endif
#ifdef SINKEXPORT_WITH_avx2
#define SINKEXPORT_IF_AVX2(X) X(avx2, Isa::kAvx2)
#else
#define SINKEXPORT_IF_AVX2(X)
#endif
#ifdef SINKEXPORT_WITH_avx2_vnni
#define SINKEXPORT_IF_AVX2_VNNI(X) X(avx2_vnni, Isa::kAvx2Vnni)
#else
#define SINKEXPORT_IF_AVX2_VNNI(X)
#endif
#ifdef SINKEXPORT_WITH_avx512_vnni
#define SINKEXPORT_IF_AVX512_VNNI(X) X(avx512_vnni, Isa::kAvx512Vnni)
#else
#define SINKEXPORT_IF_AVX512_VNNI(X)
#endif
#ifdef SINKEXPORT_WITH_avx512_bf16
#define SINKEXPORT_IF_AVX512_BF16(X) X(avx512_bf16, Isa::kAvx512Bf16)
#else
#define SINKEXPORT_IF_AVX512_BF16(X)
#endif
#ifdef SINKEXPORT_WITH_neon_dot
#define SINKEXPORT_IF_NEON_DOT(X) X(neon_dot, Isa::kNeonDot)
#else
#define SINKEXPORT_IF_NEON_DOT(X)
#endif
#ifdef SINKEXPORT_WITH_neon_i8mm
#define SINKEXPORT_IF_NEON_I8MM(X) X(neon_i8mm, Isa::kNeonI8mm)
#else
#define SINKEXPORT_IF_NEON_I8MM(X)
#endif
// X(namespace, value) for every instruction set that this build has.
#define SINKEXPORT_FOR_EACH_ISA(X) \
  SINKEXPORT_IF_PORTABLE(X)        \
  SINKEXPORT_IF_AVX2(X)            \
  SINKEXPORT_IF_AVX2_VNNI(X)       \
  SINKEXPORT_IF_AVX512_VNNI(X)     \
  SINKEXPORT_IF_AVX512_BF16(X)     \
  SINKEXPORT_IF_NEON_DOT(X)        \
  SINKEXPORT_IF_NEON_I8MM(X)
