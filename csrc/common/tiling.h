// How a matrix of rows, each a number of 8-element chunks, is spread over thread blocks.
//
// Thread (x, y) of block (i, j) works on row i * block.y + y. A warp lies in one row, since block.x is a multiple of 32,
// and has 32 * chunks_per_thread neighbouring chunks; lane l has those chunks c with c % 32 == l, at constant distances.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "common/dtypes.h"

namespace moe {

constexpr int kMaxThreads = 256, kLanes = 32;
// Chunks that fill an H200 (132 SMs x 2048 threads) once: with fewer, one chunk a thread is fastest, with more, several
// independent loads a thread.
constexpr int64_t kChunksOfOneWave = 1 << 18;

// With fewer, thread blocks are small: finalize's then find room beside those of a GEMM that has not ended (history, 37).
constexpr int64_t kChunksOfFewBlocks = 1 << 15, kFewThreads = 64;

struct Tiling {
  dim3 grid, block;
  int chunks_per_thread;
};

// The first chunk of this thread; its others follow kLanes apart.
template <int kChunksPerThread>
__device__ __forceinline__ int64_t first_chunk() {
  const unsigned lane = threadIdx.x % kLanes;
  return static_cast<int64_t>(blockIdx.y * blockDim.x + threadIdx.x - lane) * kChunksPerThread + lane;
}

inline Tiling tile_rows(int64_t rows, int64_t chunks, int max_chunks_per_thread) {
  const int per_thread = rows * chunks <= kChunksOfOneWave ? 1 : max_chunks_per_thread;
  const int64_t most = rows * chunks <= kChunksOfFewBlocks ? kFewThreads : kMaxThreads;
  const int64_t tiles = ceil_div(chunks, most * per_thread);
  const int64_t threads_x = round_up(ceil_div(chunks, tiles * per_thread), 32);
  const int64_t threads_y = std::max<int64_t>(1, most / threads_x);
  return {dim3(static_cast<unsigned>(ceil_div(rows, threads_y)), static_cast<unsigned>(tiles)),
          dim3(static_cast<unsigned>(threads_x), static_cast<unsigned>(threads_y)), per_thread};
}

// One thread block a row, all threads in x: for reductions over a row, which may have no columns.
inline Tiling tile_whole_rows(int64_t rows, int64_t chunks) {
  const int64_t threads = std::clamp<int64_t>(round_up(chunks, 32), 32, kMaxThreads);
  return {dim3(static_cast<unsigned>(rows)), dim3(static_cast<unsigned>(threads)), 1};
}

}  // namespace moe
