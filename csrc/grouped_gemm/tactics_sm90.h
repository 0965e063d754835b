// Which tactic the SM90 grouped GEMM takes: pure functions of static sizes, free of CUDA and torch. The thresholds are ratios that mean the
// same for every layer (rows an expert, tiles an SM), measured on made-up layers by benchmarks/tune.py, which has the same rule in Python.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "grouped_gemm/tactics_table_sm90.h"

namespace moe::sm90 {

// No more token tiles can exist: every expert hit starts one, and `tile_tokens` further rows start another.
constexpr int64_t max_token_tiles(int64_t num_rows, int32_t num_experts, int32_t tile_tokens = 128) {
  const int64_t hit = num_rows < num_experts ? num_rows : num_experts;
  return hit + (num_rows - hit) / tile_tokens;
}

// ---- two fused GEMMs ----

enum class Elements { bits16, float8, packed, packed_float8 };  // what is multiplied; packed: weights, by 16-bit tokens or float8 ones

// Tiles of both GEMMs: Mode (sm90_config.h), and weight rows (split) or the most tokens (gated, of 256 weight rows).
//   split: the most rows of GEMM1's tiles, see split_rows().   split32: not packed.   split256: packed only.
//   gated32: packed only, two thread blocks an SM.   gathered128: gated128 whose GEMM1 gathers its tokens; the other gated ones read
//   permuted ones.   split: up to kMaxSplitSlots slots.
enum class Tiles { split32, split64, split128, split256, gated32, gated64, gated128, gathered128 };
constexpr const char* kTilesNames[] = {"split32", "split64", "split128", "split256", "gated32", "gated64", "gated128", "gathered128"};
constexpr const char* kGemm2Alone = "+gemm2";  // behind those in a tactic's name

constexpr int32_t kMaxSplitSlots = 384;     // of a thread each
constexpr int32_t kMostTokensRounded = 64;  // of a tile whose act is rounded (FusedGemms::act_format)

struct Tactic {
  Tiles tiles = Tiles::gated128;
  bool gemm2_alone = false;  // GEMM2 in a launch of its own, with the tiles of a single GEMM; gated only
};

// What is known of a layer before it runs.
struct LayerFacts {
  Elements elements;
  int64_t num_rows;           // the most that can be
  int32_t num_experts;
  int64_t hidden_size, intermediate_size;
  int32_t num_sms;
  bool can_gather;            // whether GEMM1 may read the caller's tokens as they are (gathered128)
  bool can_split;             // or quantise them itself (split; up to kMaxSplitSlots)
  double local_share;         // of num_rows, expected here: with an expert_map, local experts of global ones, else 1
  bool rounds_acts;           // packed: whether tokens are rounded to a format

  constexpr double expected_rows() const { return double(num_rows) * local_share; }
  constexpr int32_t most_tokens() const { return elements == Elements::packed_float8 || rounds_acts ? 64 : 128; }  // of a tile
  constexpr bool may_split() const { return can_split && num_rows <= kMaxSplitSlots; }
};

constexpr const TacticConstants& constants_of(Elements elements) {
  switch (elements) {
    case Elements::bits16: return kBits16Tactics;
    case Elements::float8: return kFloat8Tactics;
    case Elements::packed: return kPackedTactics;
    default: return kPackedFloat8Tactics;
  }
}

constexpr bool gated(Tiles tiles) { return tiles > Tiles::split256; }
constexpr bool is_packed(Elements elements) { return elements == Elements::packed || elements == Elements::packed_float8; }
constexpr int32_t tokens_of(Tiles tiles) { return !gated(tiles) || tiles == Tiles::gated32 ? 32 : tiles == Tiles::gated64 ? 64 : 128; }

constexpr bool is_possible(const LayerFacts& f, const Tactic& tactic) {
  if (tactic.tiles == Tiles::split32 && is_packed(f.elements)) return false;
  if ((tactic.tiles == Tiles::gated32 || tactic.tiles == Tiles::split256) && f.elements != Elements::packed) return false;
  if (tokens_of(tactic.tiles) > f.most_tokens()) return false;
  if (tactic.tiles == Tiles::gathered128 && !f.can_gather) return false;
  if (!gated(tactic.tiles) && !f.may_split()) return false;
  return gated(tactic.tiles) || !tactic.gemm2_alone;
}

constexpr int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// How many experts are hit if every row draws one at random.
inline double expected_hit(double rows, int32_t num_experts) { return num_experts * (1 - std::exp(-rows / num_experts)); }

// Weight rows of split tiles: as few as give no SM more tiles than `most` rows do, so that they end together. Down to `least` by `step`, which is 8 (16
// bits), or 0 for halves (where a tile has to lie within a block of 128 or 64 rows).
inline int32_t split_rows(double hit, int64_t part_rows, int32_t parts, int32_t num_sms, int32_t most, int32_t least, int32_t step) {
  const auto rounds = [&](int32_t rows) { return std::ceil(hit * parts * double(tiles_of(part_rows, rows)) / num_sms); };
  int32_t best = most;
  for (int32_t rows = most; rows >= least && rounds(rows) <= rounds(most); rows = step > 0 ? rows - step : rows / 2) best = rows;
  return best;
}

inline Tiles choose_tiles(const LayerFacts& f) {
  const TacticConstants& c = constants_of(f.elements);
  const double rows = f.expected_rows(), hit = expected_hit(rows, f.num_experts);
  const auto tiles = [&](int64_t weight_rows, int64_t tile_rows) { return hit * double(tiles_of(weight_rows, tile_rows)); };
  const auto rows_an_expert_up_to = [&](double most) { return rows <= most * f.num_experts; };
  const int64_t gemm1_rows = 2 * f.intermediate_size, gemm2_rows = f.hidden_size;
  // Split where tiles of 256 weight rows are too few to keep the memory busy and an expert has few tokens.
  const double fewest = std::min(tiles(gemm1_rows, 256), tiles(gemm2_rows, 256));
  if (f.may_split() && rows_an_expert_up_to(c.split_rows) && fewest < c.split_rounds * f.num_sms) {
    if (!is_packed(f.elements) && tiles(gemm1_rows, 128) < c.split32_rounds * f.num_sms) return Tiles::split32;
    if (tiles(gemm1_rows, 128) < c.split64_rounds * f.num_sms) return Tiles::split64;
    const auto rounds = [&](int64_t tile_rows) { return std::ceil(2 * tiles(f.intermediate_size, tile_rows) / f.num_sms); };  // of GEMM1
    return f.elements == Elements::packed && c.split256_cost * rounds(256) < rounds(128) ? Tiles::split256 : Tiles::split128;
  }
  // Two thread blocks an SM hide the latency of unpacking, but each takes longer, so that the last tiles cost more.
  if (f.elements == Elements::packed && rows_an_expert_up_to(c.gated32_rows) && fewest >= c.gated32_rounds * f.num_sms) return Tiles::gated32;
  if (rows_an_expert_up_to(c.gated64_rows) || f.most_tokens() == 64) return Tiles::gated64;
  // Gathering saves writing and reading permuted tokens; but every row tile copies its tokens anew by instructions, where TMA takes permuted
  // ones, and the consumers wait for a fence (of which 16 bits notice less).
  return f.can_gather && tiles_of(f.intermediate_size, 128) <= c.gathered_row_tiles ? Tiles::gathered128 : Tiles::gated128;
}

// Where GEMM2's tiles are few and long: smaller ones, in a launch of their own, end together. With few rows (16 bits) memory decides, and one launch
// reads on while GEMM1 ends. Packed weights in gated64, by four warpgroups: a launch of its own is mostly slower, up to 16 %; with 6
// to 12 experts up to 11 % faster at some points.
inline bool gemm2_alone(const LayerFacts& f, Tiles tiles) {
  if (is_packed(f.elements) && tiles == Tiles::gated64) return false;
  const TacticConstants& c = constants_of(f.elements);
  const double rows = f.expected_rows(), hit = expected_hit(rows, f.num_experts);
  const double token_tiles = hit > 0 ? hit * std::ceil(rows / hit / tokens_of(tiles)) : 0;
  const double gemm2_tiles = token_tiles * double(tiles_of(f.hidden_size, 256));
  return gated(tiles) && gemm2_tiles < c.alone_rounds * f.num_sms && f.intermediate_size >= c.alone_k_blocks * 128 && rows >= c.alone_rows * f.num_experts;
}

inline Tactic choose_tactic(const LayerFacts& f) {
  const Tiles tiles = choose_tiles(f);
  return {tiles, gemm2_alone(f, tiles)};
}

inline std::string tactic_name(const Tactic& tactic) {
  return std::string(kTilesNames[int(tactic.tiles)]) + (tactic.gemm2_alone ? kGemm2Alone : "");
}

inline std::vector<Tactic> possible_tactics(const LayerFacts& f) {
  std::vector<Tactic> tactics;
  for (int i = 0; i < int(std::size(kTilesNames)); ++i) {
    for (const bool alone : {false, true}) {
      if (const Tactic tactic{Tiles(i), alone}; is_possible(f, tactic)) tactics.push_back(tactic);
    }
  }
  return tactics;
}

// ---- one GEMM ----

struct GemmFacts {
  int64_t num_rows;               // the most that can be
  int32_t num_experts, part_rows, parts;
  int64_t bytes_of_weight_row;    // of K values; packed: 0
  int32_t num_sms;
};

// Up to here, hardly any expert has more than 64 tokens, or 32.
constexpr bool few_tokens(int64_t num_rows, int32_t num_experts) { return num_rows <= 48 * int64_t(num_experts); }
constexpr bool very_few_tokens(int64_t num_rows, int32_t num_experts) { return num_rows <= 12 * int64_t(num_experts); }

// Up to here, weights are fetched into L2 by the 128 bytes of a row that are asked for, else by 256, which are the next K block's, too (history, 32).
constexpr bool fetches_few_bytes(int64_t num_rows, int32_t num_experts) { return num_rows <= 32 * int64_t(num_experts); }

// Weight rows of a tile: 64, 128 or 256. Its tokens (8, 16, .. 128) follow each expert's count, on the device.
constexpr int32_t choose_tile_rows(const GemmFacts& f) {
  const int64_t token_tiles = max_token_tiles(f.num_rows, f.num_experts) * f.parts;
  if (token_tiles * tiles_of(f.part_rows, 256) >= 8 * f.num_sms) return 256;  // enough of them: the last round is a small part of all
  // Decode: more thread blocks pull more bytes; and where experts are not all local, tiles are fewer than they could be (history, 36; packed weights,
  // of which two thread blocks share an SM, have not been measured so).
  const int32_t enough = very_few_tokens(f.num_rows, f.num_experts) && f.bytes_of_weight_row >= 2048 ? 2 : 1;
  return token_tiles * tiles_of(f.part_rows, 128) >= enough * f.num_sms ? 128 : 64;
}

// Whether every thread block takes each grid-th tile. More tiles are drawn from a counter, so that thread blocks do not drift apart; but the
// counter has to be set to 0 before, by an operation of its own.
constexpr bool tiles_are_dealt(const GemmFacts& f) {
  return max_token_tiles(f.num_rows, f.num_experts, 32) * f.parts * tiles_of(f.part_rows, choose_tile_rows(f)) <= 4 * int64_t(f.num_sms);
}

}  // namespace moe::sm90
