// What nvcc alone knows of device code, for a host compiler: the rounding of these operations is the same on both, so
// the arithmetic of a kernel can be called and tested without a GPU. Warps and blocks cannot: those names only compile.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

using std::max;
using std::min;

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// Ties to even; NaN gives 0, and what does not fit saturates.
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  if (x >= 2147483648.f) return INT32_MAX;
  return x < -2147483648.f ? INT32_MIN : static_cast<int>(std::nearbyint(x));
}

// Declared for templates that name them; never called on the host.
float __shfl_xor_sync(unsigned lanes, float x, int lane_mask);
void __syncthreads();
extern const uint3 threadIdx;
extern const dim3 blockDim;
