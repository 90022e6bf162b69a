#include "isa.h"

#include <cstring>

#include "problem.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sinkexport::cpu {
namespace {

constexpr const char* kNames[kIsas] = {"portable",    "avx2",     "avx2_vnni", "avx512_vnni",
                                       "avx512_bf16", "neon_dot", "neon_i8mm"};

#if defined(__x86_64__)
// Which registers the operating system keeps: bits of XCR0.
unsigned savedRegisters() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool runs(Isa isa) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool has_fma = c >> 12 & 1, has_xgetbv = c >> 27 & 1, has_avx = c >> 28 & 1, has_f16c = c >> 29 & 1;
  if (!has_fma || !has_xgetbv || !has_avx || !has_f16c || (savedRegisters() & 0x6) != 0x6) return false;
  unsigned features_b, features_c, next_a = 0;
  if (!__get_cpuid_count(7, 0, &a, &features_b, &features_c, &d)) return false;
  if (a >= 1) __get_cpuid_count(7, 1, &next_a, &b, &c, &d);
  const bool has_avx2 = features_b >> 5 & 1;
  const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  const bool has_avx512_vnni =
      (features_b & avx512) == avx512 && (features_c >> 11 & 1) && (savedRegisters() & 0xe6) == 0xe6;
  switch (isa) {
    case Isa::kAvx2:
      return has_avx2;
    case Isa::kAvx2Vnni:
      return has_avx2 && (next_a >> 4 & 1);
    case Isa::kAvx512Vnni:
      return has_avx2 && has_avx512_vnni;
    case Isa::kAvx512Bf16:
      return has_avx2 && has_avx512_vnni && (next_a >> 5 & 1);
    default:
      return false;
  }
}
#elif defined(__aarch64__) && defined(__linux__)
bool runs(Isa isa) {
  const bool has_dot = getauxval(AT_HWCAP) >> 20 & 1, has_half = getauxval(AT_HWCAP) >> 10 & 1;
  if (!has_dot || !has_half) return false;
  return isa == Isa::kNeonDot || (isa == Isa::kNeonI8mm && (getauxval(AT_HWCAP2) >> 13 & 1));
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool runs(Isa isa) {
  int has_i8mm = 0;
  size_t size = sizeof has_i8mm;
  sysctlbyname("hw.optional.arm.FEAT_I8MM", &has_i8mm, &size, nullptr, 0);
  return isa == Isa::kNeonDot || (isa == Isa::kNeonI8mm && has_i8mm);
}
#else
bool runs(Isa) {
  return false;
}
#endif

bool isBuilt(Isa isa) {
#define SINKEXPORT_IS(name, value) \
  if (isa == value) return true;
  SINKEXPORT_FOR_EACH_ISA(SINKEXPORT_IS)
#undef SINKEXPORT_IS
  return false;
}

}  // namespace

const char* isaName(Isa isa) {
  return kNames[static_cast<int>(isa)];
}

bool hasIsa(Isa isa) {
  return isBuilt(isa) && (isa == Isa::kPortable || runs(isa));
}

Isa bestIsa() {
  for (int i = kIsas - 1; i > 0; --i) {
    if (hasIsa(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::kPortable;
}

const char* chooseIsa(const char* name, Isa& isa) {
  if (name == nullptr || *name == '\0') {
    isa = bestIsa();
    return nullptr;
  }
  char known[160] = "";
  for (int i = 0; i < kIsas; ++i) {
    const Isa candidate = static_cast<Isa>(i);
    if (!hasIsa(candidate)) continue;
    if (std::strcmp(name, kNames[i]) == 0) {
      isa = candidate;
      return nullptr;
    }
    if (*known) std::strcat(known, ", ");
    std::strcat(known, kNames[i]);
  }
  return explain("SINKEXPORT_CPU_ISA: received %.40s, expected one that this processor runs: %s", name, known);
}

}  // namespace sinkexport::cpu
