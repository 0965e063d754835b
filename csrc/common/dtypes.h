// Conversions between float32 and the narrow number types, and chunks of a row.
//
// A chunk is 8 consecutive elements: 16 bytes of bfloat16 or float16, 32 of float32. It is the unit that a thread
// loads, computes and stores; every scale block is a whole number of chunks. Chunk c of a row holds elements [8c, 8c +
// 8). Where kSize is 16, all of this holds with 16 instead of 8.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "common/formats.h"

namespace moe {

constexpr int kChunk = 8;

// dispatch_dtype(dtype, [&]<typename T>() { ... }) for the three float types that activations come in.
template <typename Function>
cudaError_t dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::bfloat16: return function.template operator()<__nv_bfloat16>();
    case DType::float16: return function.template operator()<__half>();
    case DType::float32: return function.template operator()<float>();
    default: return cudaErrorInvalidValue;
  }
}

// numbers

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Two floats rounded to nearest even, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_16(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_16<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack_16<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// e4m3, saturating, ties to even, NaN stays NaN. One instruction from SM89 on, software before.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float decode_e4m3(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
}

// The next power of two, rounded up, of a non-negative finite float: 2^(byte - 127), at most 2^127.
__host__ __device__ __forceinline__ uint32_t encode_e8m0(uint32_t float_bits) {
  const uint32_t byte = (float_bits >> 23) + ((float_bits & 0x7fffffu) != 0);
  return byte < 254u ? byte : 254u;
}

__device__ __forceinline__ float decode_e8m0(uint32_t byte) { return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23); }

// Bits of 1 / 2^(byte - 127), byte <= 254; the last one is a denormal.
__host__ __device__ __forceinline__ uint32_t e8m0_inverse_bits(uint32_t byte) {
  return byte == 254u ? 0x00400000u : (254u - byte) << 23;
}

// e2m1 code of a float32 given by its bits: the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with sign, ties to even,
// saturating; NaN gives 7. With 2^e the largest power of two <= |x|, at least 1, adding 2^(e + 22) rounds |x| to a
// multiple of 2^(e - 1) and leaves that multiple in the low bits; the code is the multiple plus 2e.
__device__ __forceinline__ uint32_t encode_e2m1(float x) {
  const float magnitude = fminf(fabsf(x), 6.f);  // NaN: 6
  const uint32_t power = max(__float_as_uint(magnitude) & 0x7f800000u, 0x3f800000u);
  const uint32_t sum = __float_as_uint(__fadd_rn(magnitude, __uint_as_float(power + (22u << 23))));
  const uint32_t code = (sum & 7u) + (sum >> 22) - 2 * (127 + 22);
  const uint32_t sign = x < 0.f || __float_as_uint(x) == 0x80000000u ? 8u : 0u;
  return code | sign;
}

// The number that encode_e2m1() gives the code of.
__device__ __forceinline__ float round_e2m1(float x) {
  const float magnitude = fminf(fabsf(x), 6.f);
  const float power = __uint_as_float(max(__float_as_uint(magnitude) & 0x7f800000u, 0x3f800000u) + (22u << 23));
  const float rounded = __fadd_rn(__fadd_rn(magnitude, power), -power);
  return x < 0.f ? -rounded : rounded;
}

// The same of encode_e4m3.
__device__ __forceinline__ float round_e4m3(float x) { return decode_e4m3(static_cast<uint8_t>(pack_e4m3(x, 0.f))); }

// Two codes, `low` in the low nibble. One instruction from SM100 on.
__device__ __forceinline__ uint32_t pack_e2m1(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return __nv_cvt_float2_to_fp4x2(make_float2(low, high), __NV_E2M1, cudaRoundNearest);
#else
  return encode_e2m1(low) | encode_e2m1(high) << 4;
#endif
}

// chunks

// By words: the compiler would keep each element of 16 bits in a register of its own, and pack and unpack them.
template <typename T, int kSize = kChunk>
struct alignas(16) Chunk {
  uint32_t words[kSize * sizeof(T) / sizeof(uint32_t)];
};

// 16 bytes, or zeros without reading when not inside. One predicated instruction: with a branch, the compiler waits for
// each load before it issues the next.
__device__ __forceinline__ uint4 load_16(const void* source, bool inside) {
  uint4 words = make_uint4(0, 0, 0, 0);
#ifdef __CUDA_ARCH__
  asm volatile("{ .reg .pred inside; setp.ne.b32 inside, %5, 0; @inside ld.global.v4.b32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
               : "l"(source), "r"(static_cast<int>(inside)));
#else
  if (inside) words = *static_cast<const uint4*>(source);
#endif
  return words;
}

// Chunk `chunk` of a row of k elements, zeros at and past k. `vectorized`: k % kSize == 0 and 16-byte aligned rows.
template <int kSize = kChunk, typename T>
__device__ __forceinline__ Chunk<T, kSize> load_chunk(const T* row, int64_t chunk, int64_t k, bool vectorized) {
  Chunk<T, kSize> result;
  const int64_t first = chunk * kSize;
  uint4* words = reinterpret_cast<uint4*>(&result);
  const uint4* source = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(result) / sizeof(uint4)); ++i) {
    words[i] = load_16(source + i, vectorized && first < k);
  }
  if (vectorized) return result;
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (first + i >= k) continue;
    result.words[i / kPerWord] |= static_cast<uint32_t>(reinterpret_cast<const Bits*>(row)[first + i]) << (32 / kPerWord * (i % kPerWord));
  }
  return result;
}

template <typename T, int kSize>
__device__ __forceinline__ void to_floats(const Chunk<T, kSize>& chunk, float (&x)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(chunk.words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float: one instruction
      x[i] = __uint_as_float(i % 2 == 0 ? chunk.words[i / 2] << 16 : chunk.words[i / 2] & 0xffff0000u);
    } else {
      const uint32_t word = chunk.words[i / 2];
      x[i] = to_float(__half(__half_raw{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)}));
    }
  }
}

// Writes kBytes of `words` (4, 8 or 16) at destination, or the first `valid` bytes of them one by one.
template <int kBytes>
__device__ __forceinline__ void store_bytes(uint8_t* destination, const uint32_t (&words)[kBytes / 4], int64_t valid,
                                            bool vectorized) {
  if (vectorized) {
    if constexpr (kBytes == 16)
      *reinterpret_cast<uint4*>(destination) = make_uint4(words[0], words[1], words[2], words[3]);
    if constexpr (kBytes == 8) *reinterpret_cast<uint2*>(destination) = make_uint2(words[0], words[1]);
    if constexpr (kBytes == 4) *reinterpret_cast<uint32_t*>(destination) = words[0];
    return;
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if (i < valid) destination[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
  }
}

inline bool aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace moe
