// Grouped GEMM on the SM80 tensor cores (mma.sync): out[r, n] = scale * sum_k a[r, k] * b[e, n, k] (+ bias[e, n])
// for rows r in [expert_offsets[e], end_row(e)), any offsets.
//   a [num_rows, k], b [num_experts, n, k] row-major, bfloat16, float16 or int8; out bfloat16, float16 or float32.
//   scale = 1; for int8 it is a_scale[r] * b_scale[e, n], one float32 per row of a and of b.
//
// A persistent grid walks the tiles [kTileM, 128] of all experts. A tile runs over k in slabs of 64 bytes a row:
// cp.async keeps kStages - 1 slabs in flight, ldmatrix feeds the registers one k step ahead of the mma. Rows past the
// end of an expert (of b) repeat its last row, so nothing outside is read; their results are dropped. Each output is
// summed in k order whatever the tile height, so a row's result does not depend on the other rows.
// The PTX of compute_80 runs on every later GPU too.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.h"
#include "grouped_gemm/grouped_gemm.h"

namespace moe {
namespace {

constexpr int kThreads = 128;
constexpr int kTileN = 128;
constexpr int kSlabBytes = 64;              // of a row in shared memory: 32 16-bit or 64 8-bit values
constexpr int kStepBytes = 32;              // of k that one mma consumes
constexpr int kSteps = kSlabBytes / kStepBytes;
constexpr int kStages = 4;
constexpr int kRowsPerPass = kThreads * 16 / kSlabBytes;  // rows that the block copies with one cp.async a thread

// Thread blocks an SM holds at once; the tallest tile needs up to 255 registers a thread.
template <int kTileM>
constexpr int kBlocksPerSm = kTileM == 128 ? 2 : kTileM == 64 ? 3 : 4;
template <int kTileM>
constexpr int kSmemBytes = kStages * (kTileM + kTileN) * kSlabBytes;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- instructions -------------------------------------------------------------------------------------------------

// Copies 16 bytes, or writes 16 zero bytes without reading when `valid` is false.
__device__ void cp_async_16(uint32_t smem, const void* gmem, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid ? 16 : 0));
}
__device__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

__device__ void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(smem) : "memory");
}

// One m16n8 tile over 32 bytes of k. The register layout of the three types is the same, counted in bytes.
#define MOE_MMA(Element, Sum, constraint, shape_and_types)                                                        \
  __device__ void mma(Element, Sum(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) {                        \
    asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"     \
                 : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                             \
  }
MOE_MMA(__nv_bfloat16, float, "+f", "m16n8k16.row.col.f32.bf16.bf16.f32")
MOE_MMA(__half, float, "+f", "m16n8k16.row.col.f32.f16.f16.f32")
MOE_MMA(int8_t, int32_t, "+r", "m16n8k32.row.col.s32.s8.s8.s32")
#undef MOE_MMA

template <typename Element>
struct AccumulatorOf { using Type = float; };
template <>
struct AccumulatorOf<int8_t> { using Type = int32_t; };

// ---- tiles --------------------------------------------------------------------------------------------------------

struct Tile {
  int expert, row, row_end, col;  // rows [row, row_end) of `expert`, at most kTileM of them count
};

// Numbers the tiles of all experts. Each warp holds 32 experts at a time, one a lane; indices asked for must not fall.
template <int kTileM>
class TileScheduler {
 public:
  __device__ explicit TileScheduler(const GroupedGemmArgs& args) : args_(args), n_tiles_(ceil_div(args.n, kTileN)) {}

  __device__ bool find(int index, Tile& tile) {
    const int lane = threadIdx.x % 32;
    for (; first_expert_ < args_.num_experts; first_expert_ += 32) {
      const int expert = first_expert_ + lane;
      const bool exists = expert < args_.num_experts;
      const int begin = exists ? args_.expert_offsets[expert] : 0, end = exists ? args_.end_row(expert) : 0;
      int last = ceil_div(end - begin, kTileM) * n_tiles_;  // becomes the inclusive sum over the lanes
      const int count = last;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(~0u, last, distance);
        if (lane >= distance) last += other;
      }
      const int local = index - first_tile_;
      const int owner = __popc(__ballot_sync(~0u, last <= local));  // lanes whose tiles all come before
      if (owner < 32) {
        place(local - __shfl_sync(~0u, last - count, owner), __shfl_sync(~0u, begin, owner),
              __shfl_sync(~0u, end, owner), tile);
        tile.expert = first_expert_ + owner;
        return true;
      }
      first_tile_ += __shfl_sync(~0u, last, 31);
    }
    return false;
  }

 private:
  // Bands of 8 row tiles, column by column: what runs at the same time shares rows of a and of b in the L2 cache.
  __device__ void place(int index, int begin, int end, Tile& tile) const {
    constexpr int kBand = 8;
    const int band = index / (kBand * n_tiles_);
    const int height = min(kBand, ceil_div(end - begin, kTileM) - band * kBand);
    index -= band * kBand * n_tiles_;
    tile.row = begin + (band * kBand + index % height) * kTileM;
    tile.row_end = end;
    tile.col = index / height * kTileN;
  }

  const GroupedGemmArgs& args_;
  int n_tiles_;
  int first_expert_ = 0, first_tile_ = 0;
};

// ---- one tile -----------------------------------------------------------------------------------------------------

// Byte offset of 16-byte chunk `chunk` of row `row`. Rows 2i and 2i+1 share 128 bytes; the XOR spreads the same chunk
// of eight rows over all banks, so neither cp.async nor ldmatrix conflicts. It repeats every 8 rows.
__device__ int swizzled(int row, int chunk) { return row * kSlabBytes + ((chunk ^ (row / 2 % 4)) * 16); }

// Copies slabs [kRows, 64 bytes] of a row-major matrix; rows at or past `num_rows` repeat the last one.
template <int kRows>
class SlabLoader {
 public:
  __device__ SlabLoader(const void* matrix, int64_t first_row, int num_rows, int row_bytes)
      : row_bytes_(row_bytes), chunk_(threadIdx.x % 4), row_(threadIdx.x / 4) {
    source_ = static_cast<const uint8_t*>(matrix) + first_row * row_bytes + chunk_ * 16;
    for (int pass = 0; pass < kPasses; ++pass) {
      offset_[pass] = min(row_ + pass * kRowsPerPass, num_rows - 1) * row_bytes;
    }
  }

  __device__ void load(int slab, uint32_t smem) const {
    if (kRows < kRowsPerPass && row_ >= kRows) return;
    const int k_byte = slab * kSlabBytes;
    const bool valid = k_byte + chunk_ * 16 < row_bytes_;  // past the end of k: zeros
    const uint32_t target = smem + swizzled(row_, chunk_);
    for (int pass = 0; pass < kPasses; ++pass) {
      cp_async_16(target + pass * kRowsPerPass * kSlabBytes, source_ + offset_[pass] + k_byte, valid);
    }
  }

 private:
  static constexpr int kPasses = ceil_div(kRows, kRowsPerPass);
  const uint8_t* source_;
  int row_bytes_, chunk_, row_, offset_[kPasses];
};

// The warps form a grid [kWarpsM, kWarpsN] over the tile; a warp owns [kMmaM * 16, kMmaN * 8] of it.
template <typename Element, int kTileM>
struct TileGemm {
  static constexpr int kWarpsM = kTileM == 16 ? 1 : 2;
  static constexpr int kWarpsN = kThreads / 32 / kWarpsM;
  static constexpr int kMmaM = kTileM / kWarpsM / 16;
  static constexpr int kMmaN = kTileN / kWarpsN / 8;
  static constexpr int kStageBytes = (kTileM + kTileN) * kSlabBytes;
  using Accumulator = typename AccumulatorOf<Element>::Type;

  struct Fragments { uint32_t a[kMmaM][4], b[kMmaN][2]; };

  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 / kWarpsN * kMmaM * 16;
  const int warp_col = threadIdx.x / 32 % kWarpsN * kMmaN * 8;
  Accumulator sum[kMmaM][kMmaN][4] = {};

  // An x4 load brings [16 rows, 32 bytes] of a as (rows 0-7, 8-15) x (low, high k), and of b with the two swapped.
  __device__ void read(Fragments& fragments, uint32_t stage, int step) const {
    const int a_row = warp_row + lane % 16, a_chunk = step * 2 + lane / 16;
    const int b_row = warp_col + lane / 16 * 8 + lane % 8, b_chunk = step * 2 + lane / 8 % 2;
    const uint32_t a_smem = stage + swizzled(a_row, a_chunk);
    const uint32_t b_smem = stage + kTileM * kSlabBytes + swizzled(b_row, b_chunk);
#pragma unroll
    for (int i = 0; i < kMmaM; ++i) {
      auto& a = fragments.a[i];
      ldmatrix_x4(a[0], a[1], a[2], a[3], a_smem + i * 16 * kSlabBytes);
    }
#pragma unroll
    for (int j = 0; j < kMmaN; j += 2) {
      auto &b = fragments.b[j], &next = fragments.b[j + 1];
      ldmatrix_x4(b[0], b[1], next[0], next[1], b_smem + j * 8 * kSlabBytes);
    }
  }

  __device__ void multiply(const Fragments& fragments) {
#pragma unroll
    for (int i = 0; i < kMmaM; ++i) {
#pragma unroll
      for (int j = 0; j < kMmaN; ++j) mma(Element{}, sum[i][j], fragments.a[i], fragments.b[j]);
    }
  }

  __device__ void run(const SlabLoader<kTileM>& a, const SlabLoader<kTileN>& b, int num_slabs, uint32_t smem) {
    const auto stage = [&](int slab) { return smem + slab % kStages * kStageBytes; };
    const auto load = [&](int slab) {
      if (slab < num_slabs) {
        a.load(slab, stage(slab));
        b.load(slab, stage(slab) + kTileM * kSlabBytes);
      }
      cp_async_commit();  // also when empty: the waits below count groups
    };
    Fragments fragments[2];
    __syncthreads();  // the previous tile has been read from shared memory
    for (int slab = 0; slab < kStages - 1; ++slab) load(slab);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // slab 0 is there for every warp
    read(fragments[0], stage(0), 0);
    for (int slab = 0; slab < num_slabs; ++slab) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const bool last = step == kSteps - 1;
        if (last) {
          cp_async_wait<kStages - 2>();
          __syncthreads();  // slab + 1 is there, and every warp has read all of this slab: its stage may be refilled
        }
        read(fragments[(step + 1) % 2], stage(slab + last), last ? 0 : step + 1);
        if (step == 0) load(slab + kStages - 1);  // into the stage of slab - 1
        multiply(fragments[step % 2]);
      }
    }
  }
};

// ---- epilogue -----------------------------------------------------------------------------------------------------

__device__ float2 load_pair(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::bfloat16: return __bfloat1622float2(*(reinterpret_cast<const __nv_bfloat162*>(data) + index / 2));
    case DType::float16: return __half22float2(*(reinterpret_cast<const __half2*>(data) + index / 2));
    default: return *(reinterpret_cast<const float2*>(data) + index / 2);
  }
}

__device__ void store_pair(void* data, DType dtype, int64_t index, float2 value) {
  switch (dtype) {
    case DType::bfloat16: *(reinterpret_cast<__nv_bfloat162*>(data) + index / 2) = __float22bfloat162_rn(value); break;
    case DType::float16: *(reinterpret_cast<__half2*>(data) + index / 2) = __float22half2_rn(value); break;
    default: *(reinterpret_cast<float2*>(data) + index / 2) = value;
  }
}

// An mma leaves each lane two neighbouring columns of rows lane / 4 and lane / 4 + 8.
template <typename Element, int kTileM>
__device__ void store_tile(const TileGemm<Element, kTileM>& gemm, const Tile& tile, const GroupedGemmArgs& args) {
  const int first_row = tile.row + gemm.warp_row + gemm.lane / 4;
  const int first_col = tile.col + gemm.warp_col + gemm.lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < gemm.kMmaN; ++j) {
    const int col = first_col + j * 8;
    if (col >= args.n) break;
    float2 bias{0.f, 0.f}, b_scale{1.f, 1.f};
    if (args.bias) bias = load_pair(args.bias, args.bias_dtype, int64_t{tile.expert} * args.n + col);
    if constexpr (sizeof(Element) == 1) {
      const float* scale = args.b_scale.data + tile.expert * args.b_scale.stride_group + col * args.b_scale.stride_row;
      b_scale = {scale[0], scale[args.b_scale.stride_row]};
    }
#pragma unroll
    for (int i = 0; i < gemm.kMmaM * 2; ++i) {
      const int row = first_row + i * 8;
      if (row >= tile.row_end) break;
      float2 value{float(gemm.sum[i / 2][j][i % 2 * 2]), float(gemm.sum[i / 2][j][i % 2 * 2 + 1])};
      if constexpr (sizeof(Element) == 1) {
        const float a_scale = args.a_scale.data[row * args.a_scale.stride_row];
        value = {value.x * (a_scale * b_scale.x), value.y * (a_scale * b_scale.y)};
      }
      store_pair(args.out, args.out_dtype, int64_t{row} * args.n + col, {value.x + bias.x, value.y + bias.y});
    }
  }
}

// ---- kernel and launcher ------------------------------------------------------------------------------------------

template <typename Element, int kTileM>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<kTileM>)
    grouped_gemm_sm80_kernel(const __grid_constant__ GroupedGemmArgs args) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int row_bytes = args.k * int(sizeof(Element));
  TileScheduler<kTileM> scheduler(args);
  Tile tile;
  for (int index = blockIdx.x; scheduler.find(index, tile); index += gridDim.x) {
    const SlabLoader<kTileM> a(args.a, tile.row, tile.row_end - tile.row, row_bytes);
    const SlabLoader<kTileN> b(args.b, int64_t{tile.expert} * args.n + tile.col, args.n - tile.col, row_bytes);
    TileGemm<Element, kTileM> gemm;
    gemm.run(a, b, ceil_div(row_bytes, kSlabBytes), static_cast<uint32_t>(__cvta_generic_to_shared(smem)));
    store_tile(gemm, tile, args);
  }
}

template <typename Element, int kTileM>
cudaError_t launch_tiles(const GroupedGemmArgs& args, cudaStream_t stream) {
  int device = 0, num_sms = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device)) return error;
  const auto kernel = grouped_gemm_sm80_kernel<Element, kTileM>;
  constexpr int kSmem = kSmemBytes<kTileM>;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem)) return error;
  // Each expert with rows can leave one tile partly filled.
  const int64_t partly_filled = args.num_rows < args.num_experts ? args.num_rows : args.num_experts;
  const int64_t row_tiles = args.num_rows / kTileM + partly_filled;
  const int64_t tiles = row_tiles * ceil_div(args.n, kTileN), resident = int64_t{num_sms} * kBlocksPerSm<kTileM>;
  // An ordinary launch, without programmatic overlap: PTX of compute_80 has no instruction to wait for the predecessor.
  return launch_with(false, kernel, static_cast<unsigned>(tiles < resident ? tiles : resident), kThreads, kSmem, stream, args);
}

// Few rows an expert is bound by reading b: short tiles waste the least. Limits are the mean; the result is the same.
template <typename Element>
cudaError_t launch_for(const GroupedGemmArgs& args, cudaStream_t stream) {
  const int64_t rows_per_expert = args.num_rows / args.num_experts;
  if (rows_per_expert <= 16) return launch_tiles<Element, 16>(args, stream);
  if (rows_per_expert <= 64) return launch_tiles<Element, 64>(args, stream);
  return launch_tiles<Element, 128>(args, stream);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

const char* grouped_gemm_sm80_why_not(const GroupedGemmArgs& args) {
  if (args.packing != Packing::none) return "weights must be as they are stored, not packed";
  if (args.ab_dtype != DType::bfloat16 && args.ab_dtype != DType::float16 && args.ab_dtype != DType::int8) {
    return "the SM80 kernel multiplies bfloat16, float16 and int8";
  }
  if (args.k % (args.ab_dtype == DType::int8 ? 16 : 8) != 0) return "k must be a multiple of 16 bytes";
  if (args.n % 8 != 0) return "n must be a multiple of 8";
  if (!is_aligned(args.a) || !is_aligned(args.b) || !is_aligned(args.out) || !is_aligned(args.bias)) {
    return "a, b, out and bias must start at multiples of 16 bytes";
  }
  return nullptr;
}

size_t grouped_gemm_sm80_workspace_bytes(const GroupedGemmArgs&) { return 0; }

cudaError_t grouped_gemm_sm80(const GroupedGemmArgs& args, void*, cudaStream_t stream) {
  if (grouped_gemm_sm80_why_not(args)) return cudaErrorInvalidValue;
  if (args.num_rows == 0 || args.num_experts == 0 || args.n == 0) return cudaSuccess;
  switch (args.ab_dtype) {
    case DType::bfloat16: return launch_for<__nv_bfloat16>(args, stream);
    case DType::float16: return launch_for<__half>(args, stream);
    default: return launch_for<int8_t>(args, stream);
  }
}

}  // namespace moe
