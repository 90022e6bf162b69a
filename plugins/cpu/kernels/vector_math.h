// Functions of 16 numbers at a time, by simd.h.
#pragma once

#include "simd.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

// e^x, relative error below 2e-7 (a polynomial of degree 6 on half a factor of 2). Below -87: 0; above 88: e^88.
// Source: the method of Cephes' expf, with coefficients of the Taylor series.
SINKEXPORT_INLINE Floats exp(Floats x) {
  const Floats lowest = broadcast(-87.0f);
  const Floats clamped = max(lowest, min(broadcast(88.0f), x));
  const Ints turns = toInts(clamped * broadcast(1.44269504f));
  const Floats n = toFloats(turns);
  // ln 2 in two parts, the first with few bits, so that n * part is exact.
  const Floats r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), clamped));
  Floats p = broadcast(1.0f / 720);
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return ifLess(x, lowest, broadcast(0.0f), shiftExponent(p, turns));
}

SINKEXPORT_INLINE Floats sigmoid(Floats x) {
  const Floats one = broadcast(1.0f);
  return one / (one + exp(broadcast(0.0f) - x));
}

// Near 0 by its series, where 1 - e^-2x would cancel.
SINKEXPORT_INLINE Floats tanh(Floats x) {
  const Floats one = broadcast(1.0f), size = abs(x), square = x * x;
  const Floats e = exp(broadcast(-2.0f) * size);
  const Floats far = (one - e) / (one + e);
  const Floats zero = broadcast(0.0f);
  Floats near = fma(square, broadcast(-17.0f / 315), broadcast(2.0f / 15));
  near = fma(near, square, broadcast(-1.0f / 3));
  near = fma(near, square * x, x);
  return ifLess(size, broadcast(0.1f), near, ifLess(x, zero, zero - far, far));
}

// The error function, absolute error below 3e-7. Source: Abramowitz and Stegun 7.1.26; near 0 the Taylor series.
SINKEXPORT_INLINE Floats erf(Floats x) {
  const Floats one = broadcast(1.0f), zero = broadcast(0.0f), size = abs(x), square = x * x;
  const Floats t = one / fma(broadcast(0.3275911f), size, one);
  Floats p = fma(broadcast(1.061405429f), t, broadcast(-1.453152027f));
  p = fma(p, t, broadcast(1.421413741f));
  p = fma(p, t, broadcast(-0.284496736f));
  p = fma(p, t, broadcast(0.254829592f));
  const Floats far = one - p * t * exp(zero - square);
  Floats near = fma(square, broadcast(1.0f / 216), broadcast(-1.0f / 42));
  near = fma(near, square, broadcast(0.1f));
  near = fma(near, square, broadcast(-1.0f / 3));
  near = fma(near, square, one) * x * broadcast(1.128379167f);
  return ifLess(size, broadcast(0.35f), near, ifLess(x, zero, zero - far, far));
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
