// The block quantisers of docs/ops.md, written once: x [8 or 16 elements a thread] -> values, scale, exact to the bit.
//
// A block of 128, 32 or 16 elements lies in neighbouring lanes of a warp, one chunk each; its amax goes round by
// shuffles, so all 32 lanes of a warp must call `quantize_chunk` together (with zeros past the end of the row), and
// chunk c of a row must be in a lane l with l % n == c % n, n chunks a block. Chunks of 16 take half as many divisions and
// stores as two of 8. int8 has one scale a row: `quantize_row` takes the whole thread block. Divisions and products are
// rounded explicitly, so that no compiler flag or contraction changes a bit.
#pragma once
#include "common/dtypes.h"
#include "common/formats.h"

namespace moe {

constexpr float kFloat32Max = 3.402823466e38f;
constexpr float kBfloat16Max = 3.389531390e38f;
constexpr float kAmaxMin = 1e-10f;  // keeps the scale of an all-zero block, and its inverse, finite
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr float max_value(Format format) {
  if (format == Format::int8) return 127.f;
  return pack(format) == 2 ? 6.f : 448.f;
}

// `stored` holds the bits of a float32 (int8, fp8_block) or one byte; `inverse` multiplies x.
struct Scale {
  uint32_t stored;
  float inverse;
};

template <Format kFormat, int kSize = kChunk>
struct QuantizedChunk {
  uint32_t words[chunk_bytes(kFormat, kSize) / 4];
  uint32_t scale;
};

// The largest |x|, NaN ignored (fmaxf does), infinity left to `make_scale`.
template <int kSize>
__device__ __forceinline__ float chunk_amax(const float (&x)[kSize]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) amax = fmaxf(amax, fabsf(x[i]));
  return amax;
}

// fp8_block: the scale that make_scale() divides for, in three instructions. A quotient's residual is exact, and corrects it (Markstein).
__device__ __forceinline__ float fp8_block_scale(float amax) {
  constexpr float kMax = max_value(Format::fp8_block), kReciprocal = 1.f / kMax;
  amax = fminf(fmaxf(amax, kAmaxMin), kFloat32Max);
  const float quotient = __fmul_rn(amax, kReciprocal);
  return __fmaf_rn(__fmaf_rn(-quotient, kMax, amax), kReciprocal, quotient);
}

template <Format kFormat>
__device__ __forceinline__ Scale make_scale(float amax, float global_scale) {
  amax = fminf(amax, kFloat32Max);
  if constexpr (kFormat == Format::nvfp4) {
    const float limit = __fmul_rn(max_value(kFormat), global_scale);
    const uint32_t code = pack_e4m3(__fdiv_rn(amax, limit), 0.f) & 0xffu;
    const float decoded = decode_e4m3(static_cast<uint8_t>(code));
    return {code, decoded == 0.f ? 0.f : __fdiv_rn(1.f, __fmul_rn(decoded, global_scale))};
  } else if constexpr (has_e8m0_scale(kFormat)) {
    const uint32_t byte = encode_e8m0(__float_as_uint(__fdiv_rn(amax, max_value(kFormat))));
    return {byte, __uint_as_float(e8m0_inverse_bits(byte))};
  } else {
    const float scale = __fdiv_rn(fmaxf(amax, kAmaxMin), max_value(kFormat));
    return {__float_as_uint(scale), __fdiv_rn(1.f, scale)};
  }
}

// Ties to even, saturating at +-127; NaN gives 0.
__device__ __forceinline__ uint32_t encode_int8(float x) {
  return static_cast<uint32_t>(min(max(__float2int_rn(x), -127), 127)) & 0xffu;
}

// What elements of a block stand for once they are quantised, without the global scale: exact in bfloat16 (up to its smallest normal number), but
// for fp8_block, whose scales are float32. Its infinities, too, become numbers that bfloat16 has.
template <Format kFormat>
struct Rounding {
  static constexpr Format kTo = rounded_to(kFormat);
  float scale, inverse;

  __device__ __forceinline__ Rounding(float amax, float global_scale) {
    const Scale s = make_scale<kTo>(kTo == Format::fp8_block ? fminf(amax, kBfloat16Max) : amax, global_scale);
    scale = kTo == Format::nvfp4       ? decode_e4m3(static_cast<uint8_t>(s.stored))
            : kTo == Format::fp8_block ? __uint_as_float(s.stored)
                                       : decode_e8m0(s.stored);
    inverse = s.inverse;
  }
  __device__ __forceinline__ float operator()(float x) const {
    const float scaled = __fmul_rn(x, inverse);
    return __fmul_rn(pack(kTo) == 2 ? round_e2m1(scaled) : round_e4m3(scaled), scale);
  }
};

// A chunk, already divided by its scale, as stored bytes.
template <Format kFormat, int kSize>
__device__ __forceinline__ void encode_chunk(const float (&x)[kSize], uint32_t (&words)[chunk_bytes(kFormat, kSize) / 4]) {
  if constexpr (!has_scale(kFormat)) {
    using T = std::conditional_t<kFormat == Format::fp16, __half, __nv_bfloat16>;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) words[i] = pack_16<T>(x[2 * i], x[2 * i + 1]);
  } else if constexpr (kFormat == Format::int8) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
      words[i] = encode_int8(x[4 * i]) | encode_int8(x[4 * i + 1]) << 8 | encode_int8(x[4 * i + 2]) << 16 |
                 encode_int8(x[4 * i + 3]) << 24;
    }
  } else if constexpr (pack(kFormat) == 1) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i)
      words[i] = pack_e4m3(x[4 * i], x[4 * i + 1]) | pack_e4m3(x[4 * i + 2], x[4 * i + 3]) << 16;
  } else {
#pragma unroll
    for (int i = 0; i < kSize / 8; ++i) {
      words[i] = pack_e2m1(x[8 * i], x[8 * i + 1]) | pack_e2m1(x[8 * i + 2], x[8 * i + 3]) << 8 |
                 pack_e2m1(x[8 * i + 4], x[8 * i + 5]) << 16 | pack_e2m1(x[8 * i + 6], x[8 * i + 7]) << 24;
    }
  }
}

// One chunk of every lane of a warp, for formats whose scale belongs to a block within a row, or that have none.
template <Format kFormat, int kSize>
__device__ __forceinline__ QuantizedChunk<kFormat, kSize> quantize_chunk(const float (&x)[kSize], float global_scale) {
  static_assert(kFormat != Format::int8);
  QuantizedChunk<kFormat, kSize> result;
  if constexpr (!has_scale(kFormat) && !is_rounded(kFormat)) {
    encode_chunk<kFormat>(x, result.words);
  } else {
    float amax = chunk_amax(x);
#pragma unroll
    for (int lanes = block_k(kFormat) / kSize / 2; lanes > 0; lanes /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, lanes));
    }
    float scaled[kSize];
    if constexpr (is_rounded(kFormat)) {
      const Rounding<kFormat> rounding(amax, global_scale);
#pragma unroll
      for (int i = 0; i < kSize; ++i) scaled[i] = rounding(x[i]);
    } else {
      const Scale scale = make_scale<kFormat>(amax, global_scale);
#pragma unroll
      for (int i = 0; i < kSize; ++i) scaled[i] = __fmul_rn(x[i], scale.inverse);
      result.scale = scale.stored;
    }
    encode_chunk<kFormat>(scaled, result.words);
  }
  return result;
}

template <Format kFormat, int kSize = kChunk>
__device__ __forceinline__ void store_values(const QuantizedMatrix& out, int64_t row, int64_t chunk,
                                             const uint32_t (&words)[chunk_bytes(kFormat, kSize) / 4], bool vectorized) {
  constexpr int kBytes = chunk_bytes(kFormat, kSize);
  const int64_t row_bytes = out.k * kBytes / kSize;
  uint8_t* destination = static_cast<uint8_t*>(out.values) + row * row_bytes + chunk * kBytes;
  store_bytes<kBytes>(destination, words, row_bytes - chunk * kBytes, vectorized);
}

// Writes a chunk and, from the first lane of its block, the scale. Nothing is written for chunks past the end of the
// row.
template <Format kFormat, int kSize>
__device__ __forceinline__ void store_chunk(const QuantizedMatrix& out, int64_t row, int64_t chunk,
                                            const QuantizedChunk<kFormat, kSize>& quantized, bool vectorized) {
  if (chunk * kSize >= out.k) return;
  store_values<kFormat, kSize>(out, row, chunk, quantized.words, vectorized);
  if constexpr (has_scale(kFormat)) {
    constexpr int kBlockChunks = block_k(kFormat) / kSize;
    if (chunk % kBlockChunks != 0) return;
    const int64_t index = row * out.scale_stride_row + chunk / kBlockChunks * out.scale_stride_k;
    if constexpr (kFormat == Format::fp8_block) {
      uint32_t* scale = static_cast<uint32_t*>(out.scale) + index;
      if (out.scale_stride_row == 1) {
        // Eight rows share a sector and come at different times: L2 keeps it until it is whole (8192 tokens of DeepSeek-V3: `permute` 222 -> 190 us).
        uint64_t keep;
        asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
        asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(scale), "r"(quantized.scale), "l"(keep) : "memory");
      } else {
        *scale = quantized.scale;
      }
    } else {
      static_cast<uint8_t*>(out.scale)[index] = static_cast<uint8_t>(quantized.scale);
    }
  }
}

// The maximum over the thread block, in every thread. All threads must call it; at most 1024 of them.
__device__ __forceinline__ float block_max(float x) {
  __shared__ float warp_max[32];
  const int thread = threadIdx.x, warps = (blockDim.x + 31) / 32;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  __syncthreads();  // the previous call's readers are done with warp_max
  if (thread % 32 == 0) warp_max[thread / 32] = x;
  __syncthreads();  // warp_max is complete
  x = warp_max[0];
  for (int warp = 1; warp < warps; ++warp) x = fmaxf(x, warp_max[warp]);
  return x;
}

// int8: one row by the whole thread block. `read(chunk, x)` gives the same 8 floats each time: it runs once for the
// amax and once for the values (the second time from L1).
template <typename Read>
__device__ __forceinline__ void quantize_row(const QuantizedMatrix& out, int64_t row, bool vectorized, Read&& read) {
  const int64_t chunks = ceil_div(out.k, kChunk);
  float x[kChunk];
  float amax = 0.f;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    read(chunk, x);
    amax = fmaxf(amax, chunk_amax(x));
  }
  const Scale scale = make_scale<Format::int8>(block_max(amax), 1.f);
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    read(chunk, x);
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = __fmul_rn(x[i], scale.inverse);
    encode_chunk<Format::int8>(x, words);
    store_values<Format::int8>(out, row, chunk, words, vectorized);
  }
  if (threadIdx.x == 0) static_cast<uint32_t*>(out.scale)[row * out.scale_stride_row] = scale.stored;
}

// The global scale of a row: the expert is the last one whose rows start at or before it.
__device__ __forceinline__ float global_scale_of_row(const GlobalScale& global_scale, int64_t row) {
  if (global_scale.data == nullptr) return 1.f;
  if (global_scale.count == 1) return global_scale.data[0];
  int low = 0, high = global_scale.count;  // expert_offsets[low] <= row < expert_offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (global_scale.expert_offsets[middle] <= row ? low : high) = middle;
  }
  return global_scale.data[low];
}

}  // namespace moe
