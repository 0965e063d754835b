// How the SM90 grouped GEMM cuts the rows of an expert into token tiles. Free of CUDA.
#pragma once
#include <cstdint>

namespace moe::sm90 {

constexpr int32_t kExtraTokens = 16;  // that a tall tile has more than a wide one, at most
constexpr int32_t kExtraMap = 1;      // GemmParams::tokens of so many
constexpr int32_t kMostTall = 2;      // tiles of an expert
static_assert(8 << kExtraMap == kExtraTokens);

// Tiles of `most` rows. If one or two of them leave a few rows over, each takes its share of those (tall tiles), up to `extra`: a tile for what is left
// would read all weights once more. Both are as tall, and so take as long: they have the same weights, which come from memory once only if they keep
// together (DeepSeek-V3 EP8's w13 in bf16, 264 rows as 144 and 120: 3.1 GB instead of 2.0). extra: kExtraTokens, or 0 where there are no tall tiles.
struct TokenTiles {
  int32_t rows, most, count;
  bool tall;

  constexpr TokenTiles(int32_t rows, int32_t most, int32_t extra) : rows(rows), most(most), count((rows + most - 1) / most), tall(false) {
    const int32_t full = rows / most, left_over = rows - full * most;
    tall = full <= kMostTall && 0 < left_over && left_over <= extra * full;
    if (tall) count = full;
  }
  constexpr int32_t begin(int32_t tile) const {  // its first row; of tile `count`: the end
    if (tall) return tile * rows / count;
    return tile * most < rows ? tile * most : rows;
  }
};

}  // namespace moe::sm90
