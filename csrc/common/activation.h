// The activations of docs/ops.md in float32, written once for act_mul and for GEMM epilogues. Every step is rounded
// explicitly (no contraction), so both give the same bits.
#pragma once
#include <cuda_runtime.h>
#include <cstdint>
#include <type_traits>

namespace moe {

enum class Activation : int { silu, gelu, gelu_tanh, relu, swiglustep, relu2_no_mul, gelu_no_mul, silu_no_mul };

struct ActivationParams {
  Activation kind = Activation::silu;
  float alpha = 1.f, beta = 0.f;
  float limit = 0.f;       // used when has_limit
  bool has_limit = false;
};

__host__ __device__ constexpr bool is_gated(Activation kind) { return kind < Activation::relu2_no_mul; }

#ifdef __CUDACC__

// x * sigmoid(alpha * x) = x / (1 + 2^(-alpha * log2(e) * x)), by the hardware's 2^x and 1/x (relative error < 1e-6 for
// |alpha * x| < 16), without the range checks of a division: the denominator is at least 1, and beyond 2^126 the quotient may be 0. With IEEE
// division, Qwen3-30B's GEMM1 with this in its epilogue took 29 % longer than without (H200, fp8_block, 8192 tokens).
__device__ __forceinline__ float silu(float x, float alpha) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, __fmul_rn(alpha, -1.44269504f))));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fadd_rn(1.f, power)));
  return __fmul_rn(x, inverse);
}

__device__ __forceinline__ float gelu_erf(float x) {
  return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.f, erff(__fmul_rn(x, 0.70710678118654752f))));
}

__device__ __forceinline__ float gelu_tanh(float x) {
  const float inner = __fmul_rn(0.79788456080286536f, __fadd_rn(x, __fmul_rn(0.044715f, __fmul_rn(x, __fmul_rn(x, x)))));
  return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.f, tanhf(inner)));
}

// y of a (gate, up) pair (up is ignored by the *_no_mul kinds); a NaN stays a NaN through every clamp. The kind is known at compile time, and so
// is whether silu has a limit: choose outside the loop over elements (with_gated_activation). A switch inside an unrolled loop costs more in
// instruction fetches than the arithmetic (GEMM1's epilogue took 2x the time of its whole main loop), and a branch for each limit most of an
// epilogue's time.
template <Activation kKind, bool kLimited = false>
struct ActivationFunction {
  const ActivationParams& p;

  __device__ __forceinline__ float operator()(float gate, float up) const {
    auto at_most = [](float x, float limit) { return x > limit ? limit : x; };
    auto clamp = [&](float x, float limit) { return x < -limit ? -limit : at_most(x, limit); };
    auto positive = [](float x) { return x < 0.f ? 0.f : x; };
    if constexpr (kKind == Activation::silu) {
      if constexpr (kLimited) {
        gate = at_most(gate, p.limit);
        up = clamp(up, p.limit);
      }
      return __fmul_rn(__fadd_rn(up, p.beta), silu(gate, p.alpha));
    }
    if constexpr (kKind == Activation::gelu) return __fmul_rn(gelu_erf(gate), up);
    if constexpr (kKind == Activation::gelu_tanh) return __fmul_rn(gelu_tanh(gate), up);
    if constexpr (kKind == Activation::relu) return __fmul_rn(positive(gate), up);
    if constexpr (kKind == Activation::swiglustep) return __fmul_rn(at_most(silu(gate, 1.f), p.limit), clamp(up, p.limit));
    if constexpr (kKind == Activation::relu2_no_mul) return __fmul_rn(positive(gate), positive(gate));
    if constexpr (kKind == Activation::gelu_no_mul) return gelu_erf(gate);
    if constexpr (kKind == Activation::silu_no_mul) return silu(gate, 1.f);
  }
};

// f(function) with the ActivationFunction of a gated kind.
template <class F>
__device__ __forceinline__ void with_gated_activation(const ActivationParams& p, F&& f) {
  switch (p.kind) {
    case Activation::gelu: return f(ActivationFunction<Activation::gelu>{p});
    case Activation::gelu_tanh: return f(ActivationFunction<Activation::gelu_tanh>{p});
    case Activation::relu: return f(ActivationFunction<Activation::relu>{p});
    case Activation::swiglustep: return f(ActivationFunction<Activation::swiglustep>{p});
    default:
      if (p.has_limit) return f(ActivationFunction<Activation::silu, true>{p});
      return f(ActivationFunction<Activation::silu>{p});
  }
}

#endif  // __CUDACC__

}  // namespace moe
