// Vectors as the kernels see them, whatever the processor: 16 lanes of 4 bytes. Included by *_kernel.cpp only, which
// are compiled for one instruction set each (SINKEXPORT_ISA, CMakeLists.txt). Intrinsics are in simd_*.h alone.
//
// Keep templates and inline functions of the standard library out of *_kernel.cpp: the linker may keep the copy that
// was compiled for a newer processor, for everybody.
//
// Types: Floats (16 float), Ints (16 int32), Bytes (64 bytes: 16 lanes of 4), Quad (4 bytes, the same in every lane).
//
//   load(const float*) store(float*, Floats) loadPart(const float*, n) storePart(float*, Floats, n)   n lanes of 16
//   loadHalf(const uint16_t*) storeHalf(uint16_t*, Floats)       float16, to nearest even
//   loadBf16(const uint16_t*)                                    bfloat16
//   loadInt8(const int8_t*) loadUint8(const uint8_t*)            16 bytes to Ints
//   storeInt8(int8_t*, Ints)                                     values within int8
//   broadcast(float) broadcastInt(int32_t)
//   a + b, a - b, a * b, a / b; fma(a, b, c) = a * b + c; max, min (b if either is not a number), abs, floor
//   ifLess(a, b, yes, no): yes where a < b, no elsewhere
//   sqrt(float); sum(Floats), largest(Floats): one float
//   toFloats(Ints); toInts(Floats): to nearest even
//   shiftExponent(Floats x, Ints n): x * 2^n, for results in the normal range
//   a + b, a - b of Ints
//   pairs of bfloat16: evenBf16(Bytes), oddBf16(Bytes): Floats of the first, of the second of each lane's two
//   loadBytes(const void*), lowNibbles(Bytes), highNibbles(Bytes): values 0 .. 15 in every byte
//   loadQuad(const int8_t*): 4 bytes to every lane
//   dotSmall(Ints sum, Bytes a, Quad b): sum + a . b in every lane; a 0 .. 15, b -127 .. 127
//   dotInt8(Ints sum, Bytes a, Quad b): sum + (a + kInt8Offset) . b; a and b -127 .. 127. Where kInt8Offset is 128 the
//     processor multiplies unsigned by signed bytes: begin with -128 * (sum of b).
//   prepareInt8(Bytes): what dotInt8 wants as a, once for many b
//   With SINKEXPORT_UNSIGNED_DOT, where kInt8Offset is 128:
//     dotUnsigned(Ints sum, Quad a, Bytes b): sum + a . b in every lane; a 0 .. 255, b -128 .. 127
//     repeatQuad(int): a byte four times in every lane; repeatByte(Ints): each lane's value 0 .. 255 four times
//     a - b of Bytes; storeBytes(void*, Bytes), loadInts(const int32_t*), storeInts(int32_t*, Ints)
//     storeUint8(uint8_t*, Ints): values within uint8
//   minusProduct(Ints sum, Ints a, int32_t b): sum - a * b; a 0 .. 255, |b| < 32768
//   prefetch(const void*): to all caches
//   prefetchOnce(const void*): what is read once. Where the processor can, past the second-level cache, which then
//   keeps
//     what the host's own code wants between two nodes (measured on Zen 5; a plain prefetch on ARM)
//   kRows: rows of a tile of the integer matmul; kFloatRows: of the others; kTiles, kFloatTiles: 16 outputs each
#pragma once

#include <cstdint>
#include <cstring>

#define SINKEXPORT_INLINE inline __attribute__((always_inline))

#if defined(SINKEXPORT_ISA_avx512_vnni) || defined(SINKEXPORT_ISA_avx512_bf16)
#include "simd_avx512.h"
#elif defined(SINKEXPORT_ISA_avx2) || defined(SINKEXPORT_ISA_avx2_vnni)
#include "simd_avx2.h"
#elif defined(SINKEXPORT_ISA_neon_dot) || defined(SINKEXPORT_ISA_neon_i8mm)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif
