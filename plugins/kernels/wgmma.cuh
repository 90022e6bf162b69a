// Matrix instructions of a warpgroup (compute capability 9.0 alone, compiled for sm_90a): sums in registers, the right
// factor in shared memory, the left one in either. What they compute is done in the background.
//
// SINKEXPORT_HAS_WGMMA: whether what is being compiled has them.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SINKEXPORT_HAS_WGMMA 1
#endif

namespace sinkexport {

constexpr int kWarpgroupSize = 128;

#ifdef SINKEXPORT_HAS_WGMMA

// Registers are as they were left before instructions that follow, and no later instruction moves ahead of this.
__device__ __forceinline__ void beginMatmuls() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commitMatmuls() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void waitForMatmuls() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Neither what makes these registers moves behind this, nor what uses them ahead of it.
template <int kCount>
__device__ __forceinline__ void keepHere(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keepHere(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// A factor in shared memory: rows of 64 halves along k, 128 bytes each, as a bulk copy swizzled by 128 bytes leaves
// them. Eight rows are 1,024 bytes and begin at a multiple of that. Numbers may be added to it: 16 bytes each.
__device__ __forceinline__ uint64_t describeFactor(uint32_t shared_address) {
  constexpr uint64_t kSwizzled128 = 1ull << 62, kBytesOf8Rows = uint64_t{1024 >> 4} << 32, kUnused = 1ull << 16;
  return kSwizzled128 | kBytesOf8Rows | kUnused | ((shared_address & 0x3ffffu) >> 4);
}
constexpr int kFactorStep = 2;  // to the next 16 of k

#define SINKEXPORT_SUMS_0_63                                                                             \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"   \
  "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
  "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SINKEXPORT_SUMS_64_127                                                                           \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"  \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define SINKEXPORT_8_SUMS(i)                                                                              \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define SINKEXPORT_64_SUMS(i)                                                                           \
  SINKEXPORT_8_SUMS(i), SINKEXPORT_8_SUMS(i + 8), SINKEXPORT_8_SUMS(i + 16), SINKEXPORT_8_SUMS(i + 24), \
      SINKEXPORT_8_SUMS(i + 32), SINKEXPORT_8_SUMS(i + 40), SINKEXPORT_8_SUMS(i + 48), SINKEXPORT_8_SUMS(i + 56)

// tokens: of the tile; type: f16 or bf16; names, sums: of the tile's sums; a0 .. b, adds: numbers of the operands.
#define SINKEXPORT_WGMMA_REGISTERS(tokens, type, names, sums, a0, a1, a2, a3, b0, adds)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" adds                                                          \
               ", 0;\n"                                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" tokens "k16.f32." type "." type " {" names "}, {%" a0 ", %" a1 \
               ", %" a2 ", %" a3 "}, %" b0 ", p, 1, 1, 0;\n}"                                                     \
               : sums                                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds_up)))
#define SINKEXPORT_WGMMA_SHARED(tokens, type, names, sums, a0, b0, adds)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" adds                                                         \
               ", 0;\n"                                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" tokens "k16.f32." type "." type " {" names "}, %" a0 ", %" b0 \
               ", p, 1, 1, 0, 0;\n}"                                                                             \
               : sums                                                                                            \
               : "l"(a), "l"(b), "r"(static_cast<int>(adds_up)))
#define SINKEXPORT_NAMES_64 SINKEXPORT_SUMS_0_63
#define SINKEXPORT_NAMES_128 SINKEXPORT_SUMS_0_63 "," SINKEXPORT_SUMS_64_127
#define SINKEXPORT_SUMS_64 SINKEXPORT_64_SUMS(0)
#define SINKEXPORT_SUMS_128 SINKEXPORT_64_SUMS(0), SINKEXPORT_64_SUMS(64)

// sum (+)= a . b^T, a [64, 16], b [kNumSums * 2, 16] as described. Warp w of four has rows 16 w ..; a lane's registers
// of a are those of multiplyAdd (mma.cuh), and sum[4 j ..] are those for tokens 8 j .. + 7. adds_up: to what sum was.
// a's registers and b must stay as they are until the group has been waited for.
template <typename Half, int kNumSums>
__device__ __forceinline__ void multiplyWide(float (&sum)[kNumSums], const uint32_t (&a)[4], uint64_t b, bool adds_up) {
  static_assert(kNumSums == 64 || kNumSums == 128);
  constexpr bool kIsFloat16 = std::is_same_v<Half, __half>;
  if constexpr (kNumSums == 128) {
    if constexpr (kIsFloat16) {
      SINKEXPORT_WGMMA_REGISTERS("256", "f16", SINKEXPORT_NAMES_128, SINKEXPORT_SUMS_128, "128", "129", "130", "131",
                                 "132", "133");
    } else {
      SINKEXPORT_WGMMA_REGISTERS("256", "bf16", SINKEXPORT_NAMES_128, SINKEXPORT_SUMS_128, "128", "129", "130", "131",
                                 "132", "133");
    }
  } else if constexpr (kIsFloat16) {
    SINKEXPORT_WGMMA_REGISTERS("128", "f16", SINKEXPORT_NAMES_64, SINKEXPORT_SUMS_64, "64", "65", "66", "67", "68",
                               "69");
  } else {
    SINKEXPORT_WGMMA_REGISTERS("128", "bf16", SINKEXPORT_NAMES_64, SINKEXPORT_SUMS_64, "64", "65", "66", "67", "68",
                               "69");
  }
}

// The same with a in shared memory.
template <typename Half, int kNumSums>
__device__ __forceinline__ void multiplyWide(float (&sum)[kNumSums], uint64_t a, uint64_t b, bool adds_up) {
  static_assert(kNumSums == 64 || kNumSums == 128);
  constexpr bool kIsFloat16 = std::is_same_v<Half, __half>;
  if constexpr (kNumSums == 128) {
    if constexpr (kIsFloat16) {
      SINKEXPORT_WGMMA_SHARED("256", "f16", SINKEXPORT_NAMES_128, SINKEXPORT_SUMS_128, "128", "129", "130");
    } else {
      SINKEXPORT_WGMMA_SHARED("256", "bf16", SINKEXPORT_NAMES_128, SINKEXPORT_SUMS_128, "128", "129", "130");
    }
  } else if constexpr (kIsFloat16) {
    SINKEXPORT_WGMMA_SHARED("128", "f16", SINKEXPORT_NAMES_64, SINKEXPORT_SUMS_64, "64", "65", "66");
  } else {
    SINKEXPORT_WGMMA_SHARED("128", "bf16", SINKEXPORT_NAMES_64, SINKEXPORT_SUMS_64, "64", "65", "66");
  }
}

#undef SINKEXPORT_SUMS_0_63
#undef SINKEXPORT_SUMS_64_127
#undef SINKEXPORT_8_SUMS
#undef SINKEXPORT_64_SUMS
#undef SINKEXPORT_WGMMA_REGISTERS
#undef SINKEXPORT_WGMMA_SHARED
#undef SINKEXPORT_NAMES_64
#undef SINKEXPORT_NAMES_128
#undef SINKEXPORT_SUMS_64
#undef SINKEXPORT_SUMS_128

// Four 8 x 8 matrices of halves between a warp's registers, as sums have them, and shared memory, where they lie
// transposed: rows of 16 bytes, lane l naming the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void storeTransposed(uint32_t address, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m[0]),
               "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}
__device__ __forceinline__ void loadTransposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// Registers of a thread from here on, of a kernel whose warpgroups all say what they want.
template <int kRegisters>
__device__ __forceinline__ void takeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void giveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace sinkexport
