// Mode::split, for few slots: the token warps make the tokens of both GEMMs by themselves, in shared memory and quantised.
//   GEMM1: row r of an expert = quantize(hidden_states[slot / top_k] (* topk_weights[slot] if given)), slot the r-th one of that expert
//   GEMM2: row r = quantize(activation(gate_up[r])), gate_up float32 in device memory
// So nothing is permuted before the kernel, and between the GEMMs there is one way through memory: gate_up is 0 at the start, no value is
// stored as +0 (but as -0, which makes no difference to any sum), and whoever needs four of them reads until none is +0. The bits are those
// of permute, of the gated epilogues and of act_mul. `quantize` is the rounding of KernelParams::act_format, too.
#pragma once
#include "grouped_gemm/epilogue_sm90.cuh"
#include "grouped_gemm/producers_sm90.cuh"

namespace moe::sm90 {

// The rows of few slots, sorted stably by expert: smem.offsets, tile_begin, and row_tokens, the token of each row. Its barriers are for all
// threads. `expert`: of slot threadIdx.x; -1: none. `draw` is called as soon as the kernel before has to be waited for.
template <class C, class F>
__device__ __forceinline__ void place_slots(const KernelParams& p, const Smem<C>& smem, int expert, F&& draw) {
  static_assert(kMaxSplitSlots <= C::kThreads && kMaxSplitSlots % 8 == 0 && C::kStagingBytes >= 256 + 2 * kMaxSplitSlots);
  auto experts = reinterpret_cast<int16_t*>(smem.staging_ptr + 256);  // of each slot; count_tiles() uses the bytes before
  for (int e = threadIdx.x; e <= p.num_experts; e += C::kThreads) smem.offsets[e] = 0;
  if (threadIdx.x < kMaxSplitSlots) experts[threadIdx.x] = int16_t(expert);
  __syncthreads();  // zeroed, and experts is complete
  int rank = 0;     // slots of this expert before this one
  const auto token = uint16_t(threadIdx.x / uint32_t(p.top_k));
  if (expert >= 0) {
    atomicAdd(smem.offsets + expert + 1, 1);
    for (int first = 0; first < int(threadIdx.x); first += 8) {
      const uint4 eight = *reinterpret_cast<const uint4*>(experts + first);
      const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) rank += first + i < threadIdx.x && (words[i / 2] >> 16 * (i % 2) & 0xFFFF) == uint32_t(expert);
    }
  }
  __syncthreads();  // offsets[e + 1] = slots of expert e
  draw();
  count_tiles<C>(p, smem, true);
  if (expert >= 0) smem.row_tokens[smem.offsets[expert] + rank] = token;
  __syncthreads();  // row_tokens is complete
}

__device__ __forceinline__ float4 load_relaxed(const float* address) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address) : "memory");
  return v;
}

// Four neighbouring channels of a row of GEMM1's tokens.
template <class C>
struct HiddenChannels {
  uint2 bits;
  float weight;

  __device__ __forceinline__ void load(const KernelParams& p, const Smem<C>& smem, int row, int channel) {
    const int token = smem.row_tokens[row];
    bits = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.hidden_states) + int64_t(token) * p.hidden_size + channel));
    weight = p.topk_weights == nullptr ? 1.f : __ldg(p.topk_weights + token);  // top_k is 1
  }
  __device__ __forceinline__ bool is_there() const { return true; }
  __device__ __forceinline__ void values(const KernelParams& p, float (&y)[4]) const {
    const uint32_t words[2] = {bits.x, bits.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t half = words[i / 2] >> 16 * (i % 2);
      y[i] = p.hidden_dtype == DType::float16 ? __half2float(__ushort_as_half(half)) : __bfloat162float(__ushort_as_bfloat16(half));
      if (p.topk_weights != nullptr) y[i] = __fmul_rn(y[i], weight);
    }
  }
};

// Of GEMM2's.
template <class C>
struct GateUpChannels {
  float4 first, second;  // of the two parts of w13

  __device__ __forceinline__ void load(const KernelParams& p, const Smem<C>&, int row, int channel) {
    const GemmParams& g = p.gemm[0];
    const float* gate_up = static_cast<const float*>(g.out) + int64_t(row) * g.out_stride + channel;
    first = load_relaxed(gate_up);
    second = load_relaxed(gate_up + g.part_rows);
  }
  static __device__ __forceinline__ bool is_there(const float4& v) {
    return __float_as_uint(v.x) != 0 && __float_as_uint(v.y) != 0 && __float_as_uint(v.z) != 0 && __float_as_uint(v.w) != 0;
  }
  __device__ __forceinline__ bool is_there() const { return is_there(first) && is_there(second); }
  __device__ __forceinline__ void values(const KernelParams& p, float (&y)[4]) const {
    const float4 gate = p.gate_part == 0 ? first : second, up = p.gate_part == 0 ? second : first;
    with_gated_activation(p.activation, [&](auto activate) {
      y[0] = activate(gate.x, up.x);
      y[1] = activate(gate.y, up.y);
      y[2] = activate(gate.z, up.z);
      y[3] = activate(gate.w, up.w);
    });
  }
};

// A token warp: every kTokenWarps-th step of 128 k; four channels a lane, and kRowsAtOnce rows in flight, those of its next step as well.
template <class C>
struct SplitTokens {
  static_assert(C::kMaxTokens == kLanes && C::kWaves == 1);
  static constexpr int kRowsAtOnce = 4;
  using Pipe = PipelineState<C::kStages * C::kTokenSteps>;  // of steps
  const KernelParams& p;
  const Smem<C>& smem;
  const Tile tile;
  const int lane = (C::kWarpgroups == 4 ? read_thread() : threadIdx.x) % kLanes;  // split256 spills if it is kept from tile to tile

  template <class Channels>
  __device__ __forceinline__ void load(Channels (&rows)[kRowsAtOnce], int base, int channel, int channels) const {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i)
      if (base + i < tile.valid_tokens && channel < channels) rows[i].load(p, smem, tile.token + base + i, channel);
  }

  // Stores four channels of a row, quantised. Its scale (float8).
  __device__ __forceinline__ float store(int step, int row, const float (&y)[4]) const {
    const uint32_t tokens = smem.tokens + step * (C::kTokenBytes / C::kTokenSteps);
    if constexpr (C::kFloat8) {
      float mine = 0.f;  // fmaxf ignores NaN, as the contract says
#pragma unroll
      for (float value : y) mine = fmaxf(mine, fabsf(value));
      const float amax = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(mine)));
      const float scale = fp8_block_scale(amax), inverse = __frcp_rn(scale);
      auto pair = [&](float a, float b) {
        return uint32_t(__nv_cvt_float2_to_fp8x2(make_float2(__fmul_rn(a, inverse), __fmul_rn(b, inverse)), __NV_SATFINITE, __NV_E4M3));
      };
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(tokens + staged(row, lane / 4) + lane % 4 * 4), "r"(pair(y[0], y[1]) | pair(y[2], y[3]) << 16)
                   : "memory");
      return scale;
    } else {
      float x[4] = {y[0], y[1], y[2], y[3]};
      with_rounding<C>(p.act_format, [&]<Format kFormat>() {
        float amax = chunk_amax(x);
        for (int lanes = block_k(kFormat) / 8; lanes > 0; lanes /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, lanes));
        const Rounding<kFormat> rounding(amax, p.act_global_scale(tile.gemm, tile.expert));
        for (float& value : x) value = rounding(value);
      });
      constexpr DType kOut = std::is_same_v<typename C::Element, __half> ? DType::float16 : DType::bfloat16;
      const uint32_t address = tokens + lane / 16 * C::kBlockTokenBytes + staged(row, lane % 16 / 2) + lane % 2 * 8;
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(pack_16bit(kOut, x[0], x[1])), "r"(pack_16bit(kOut, x[2], x[3])) : "memory");
      return 0.f;
    }
  }

  // The steps of a tile that are this warp's: the next one is `first`, of this tile or a later one.
  template <class Channels>
  __device__ void fill(int& first, Pipe& pipe) const {
    const GemmParams& g = p.gemm[tile.gemm];
    const int channels = tile.gemm == 0 ? p.hidden_size : p.gemm[0].part_rows, steps = g.k_stages * C::kTokenSteps;
    const float* b_scale = C::kFloat8 && !C::kPacked ? weight_scales<C>(p, tile, 0) : nullptr;
    Channels rows[kRowsAtOnce];
    float b = 1.f;
    auto load_step = [&](int step) {
      if (b_scale != nullptr) b = __ldg(b_scale + min(step, g.k_blocks - 1) * g.b_scale.stride_k);
      load(rows, 0, step * 128 + 4 * lane, channels);
    };
    if (first < steps) load_step(first);
    for (; first < steps; first += C::kTokenWarps, pipe.advance(C::kTokenWarps)) {
      const int stage = pipe.stage / C::kTokenSteps, channel = first * 128 + 4 * lane;
      const bool exists = channel < channels;
      float a = 0.f;  // the scale of row `lane`
      smem.empty[stage].wait(pipe.phase ^ 1);
      for (int base = 0; base < tile.valid_tokens; base += kRowsAtOnce) {
        if (base > 0) load(rows, base, channel, channels);
        // What is not there yet is quantised all the same, once: the instructions are in the cache when it comes.
        for (int tries = 0;; ++tries) {
          bool there = true;
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) there &= !exists || base + i >= tile.valid_tokens || rows[i].is_there();
          there = __all_sync(~0u, there);
          if (there || tries == 0) {
#pragma unroll
            for (int i = 0; i < kRowsAtOnce; ++i) {
              if (base + i >= tile.valid_tokens) break;
              float y[4] = {};
              if (exists) rows[i].values(p, y);
              const float scale = store(pipe.stage, base + i, y);
              if (lane == base + i) a = scale;
            }
          }
          if (there) break;
          load(rows, base, channel, channels);
        }
      }
      if constexpr (C::kFloat8)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(smem.scales + pipe.stage * C::kBlockScaleBytes + 4 * scale_index(lane)), "f"(__fmul_rn(a, b)) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what was stored
      smem.full[stage].arrive();
      if (first + C::kTokenWarps < steps) load_step(first + C::kTokenWarps);  // not before: the arrival would wait for it
    }
    first -= steps;
  }
};

template <class C>
__device__ void make_tokens(const KernelParams& p, const Smem<C>& smem, int first) {
  typename SplitTokens<C>::Pipe pipe;
  pipe.advance(first);
  TileSlot slot;
  while (true) {
    const SplitTokens<C> loader{p, smem, wait_tile(smem, slot)};
    release_tile(smem, slot);  // copied
    if (loader.tile.size == 0) return;
    if (loader.tile.gemm == 0) loader.template fill<HiddenChannels<C>>(first, pipe);
    else loader.template fill<GateUpChannels<C>>(first, pipe);
  }
}

}  // namespace moe::sm90
