// wgmma: d[64, N] (+)= a[64, 32 bytes of K] * b[N, 32 bytes of K]^T, float32 d; b in shared memory, a there or in registers.
// Thread t of the warpgroup holds, for token group j, d[4j + {0,1}] = (row 16*(t/32) + t%32/4, token 8j + 2*(t%4) + {0,1})
// and d[4j + {2,3}] = the same eight rows below.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cute/arch/mma_sm90_desc.hpp>
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // for 48 tokens
#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

namespace moe::sm90 {

// Descriptor of a K-major operand whose rows are 128 bytes, 128-byte swizzle, in groups of eight rows (1024 bytes apart).
// Only its low word depends on the address, in units of 16 bytes: steps through an operand are additions to it.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address) {
  constexpr uint32_t kUnusedLeading = 1u << 16;
  return kUnusedLeading | ((address & 0x3FFFF) >> 4);
}
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
  constexpr uint32_t kSwizzle128B = 1u << 30, kGroupStride = 1024 >> 4;
  return uint64_t(kSwizzle128B | kGroupStride) << 32 | low;
}

template <int kCount>
__device__ __forceinline__ void fence_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(d[i]);
}

namespace detail {
namespace gmma = cute::SM90::GMMA;
constexpr auto kK = gmma::Major::K;

template <class Element, int kN> struct Instruction;
template <class Element, int kN> struct RegisterInstruction;  // a in registers
#define MOE_INSTRUCTIONS(N)                                                                                               \
  template <> struct Instruction<__nv_fp8_e4m3, N> { using type = gmma::MMA_64x##N##x32_F32E4M3E4M3_SS_TN<>; };           \
  template <> struct Instruction<__nv_bfloat16, N> { using type = gmma::MMA_64x##N##x16_F32BF16BF16_SS<kK, kK>; };         \
  template <> struct Instruction<__half, N> { using type = gmma::MMA_64x##N##x16_F32F16F16_SS<kK, kK>; };                  \
  template <> struct RegisterInstruction<__nv_fp8_e4m3, N> { using type = gmma::MMA_64x##N##x32_F32E4M3E4M3_RS_TN<>; };    \
  template <> struct RegisterInstruction<__nv_bfloat16, N> { using type = gmma::MMA_64x##N##x16_F32BF16BF16_RS<kK, kK>; };
MOE_INSTRUCTIONS(8)
MOE_INSTRUCTIONS(16)
MOE_INSTRUCTIONS(32)
MOE_INSTRUCTIONS(48)
MOE_INSTRUCTIONS(64)
MOE_INSTRUCTIONS(128)
MOE_INSTRUCTIONS(256)
#undef MOE_INSTRUCTIONS
}  // namespace detail

// d[kOffset .. kOffset + kN / 2) (+)= a * b^T.
template <class Element, int kN, size_t kOffset = 0>
struct Mma {
  template <int kCount, size_t... kIndex>
  __device__ static void expand(uint64_t a, uint64_t b, float (&d)[kCount], bool accumulate, std::index_sequence<kIndex...>) {
    using cute::SM90::GMMA::ScaleOut;
    detail::Instruction<Element, kN>::type::fma(a, b, d[kOffset + kIndex]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
  }
  template <int kCount>
  __device__ static void run(uint32_t a, uint32_t b, float (&d)[kCount], bool accumulate) {  // low words
    static_assert(kOffset + kN / 2 <= kCount);
    expand(descriptor(a), descriptor(b), d, accumulate, std::make_index_sequence<kN / 2>{});
  }
};

// d[kOffset .. kOffset + kN / 2) (+)= a * b^T with a [64, 32 bytes of K] in registers: those of thread t are (row
// 16*(t/32) + t%32/4 + 8*(j%2), the four bytes from 4*(t%4) + 16*(j/2) on).
template <class Element, int kN, size_t kOffset = 0>
struct RegisterMma {
  template <int kCount, size_t... kIndex>
  __device__ static void expand(const uint32_t* a, uint64_t b, float (&d)[kCount], bool accumulate, std::index_sequence<kIndex...>) {
    using cute::SM90::GMMA::ScaleOut;
    detail::RegisterInstruction<Element, kN>::type::fma(a[0], a[1], a[2], a[3], b, d[kOffset + kIndex]...,
                                                        accumulate ? ScaleOut::One : ScaleOut::Zero);
  }
  template <int kCount>
  __device__ static void run(const uint32_t* a, uint32_t b, float (&d)[kCount], bool accumulate) {  // b: a low word
    static_assert(kOffset + kN / 2 <= kCount);
    expand(a, descriptor(b), d, accumulate, std::make_index_sequence<kN / 2>{});
  }
};

// f(integral_constant 0), .. f(integral_constant kCount - 1): a loop whose index is a template argument.
template <int kCount, class F>
__device__ __forceinline__ void unrolled(F&& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (f(std::integral_constant<int, kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace moe::sm90
