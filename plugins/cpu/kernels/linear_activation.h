// Activations of a matmul's sums.
#pragma once

#include "linear.h"
#include "vector_math.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

template <Activation activation>
SINKEXPORT_INLINE Floats activate(Floats x) {
  if constexpr (activation == Activation::kSilu) return x * sigmoid(x);
  if constexpr (activation == Activation::kGelu) {
    return broadcast(0.5f) * x * (broadcast(1.0f) + erf(x * broadcast(0.707106781f)));
  }
  if constexpr (activation == Activation::kGeluTanh) {
    const Floats inner = fma(x * x, x * broadcast(0.044715f), x) * broadcast(0.797884561f);
    return broadcast(0.5f) * x * (broadcast(1.0f) + tanh(inner));
  }
  if constexpr (activation == Activation::kRelu2) {
    const Floats positive = max(x, broadcast(0.0f));
    return positive * positive;
  }
  return x;
}

// Of a gated block: what a gate and an up give.
template <Activation activation>
SINKEXPORT_INLINE Floats activateGated(Floats gate, Floats up, Floats limit) {
  if constexpr (activation == Activation::kClampedSwiglu) {
    const Floats g = min(gate, limit), u = max(min(up, limit), broadcast(0.0f) - limit);
    return g * sigmoid(g * broadcast(1.702f)) * (u + broadcast(1.0f));
  }
  return activate<activation>(gate) * up;
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
