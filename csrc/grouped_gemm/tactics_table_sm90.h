// Written by benchmarks/tune.py from benchmarks/results/h200_tactics.jsonl; do not edit.
#pragma once
#include <limits>

namespace moe::sm90 {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Where choose_tactic changes its mind. "Tiles an SM" are those of the experts that are likely to be hit.
struct TacticConstants {
  double split_rows;          // split up to this many rows an expert,
  double split_rounds;        // and if the GEMM with fewer tiles of 256 rows has fewer than this many an SM;
  double split64_rounds;      // of 64 rows if GEMM1 has fewer than this many tiles of 128 rows an SM
  double split32_rounds;      // not packed: of 32 rows in GEMM1 if it has fewer than this many such tiles
  double split256_cost;       // packed: of 256 rows if a round of those, at this cost of one of 128 rows, saves rounds of GEMM1;
  double gated32_rows;        // packed: gated32 up to this many rows an expert,
  double gated32_rounds;      // and if the GEMM with fewer tiles of 256 rows has at least this many an SM
  double gated64_rows;        // gated64 up to this many rows an expert
  double gathered_row_tiles;  // then tokens are gathered up to this many row tiles of GEMM1
  double alone_rounds;        // gated: GEMM2 alone with fewer tiles an SM than this,
  double alone_k_blocks;      // if its K has at least this many blocks of 128
  double alone_rows;          // and from this many rows an expert on
};

constexpr TacticConstants kBits16Tactics = {
    .split_rows = 1.5, .split_rounds = 2, .split64_rounds = 4, .split32_rounds = 0.25, .split256_cost = 0, .gated32_rows = 0, .gated32_rounds = 0,
    .gated64_rows = 12, .gathered_row_tiles = 8, .alone_rounds = 12, .alone_k_blocks = 96, .alone_rows = 96};
constexpr TacticConstants kFloat8Tactics = {
    .split_rows = 1.5, .split_rounds = 1.5, .split64_rounds = 0.4, .split32_rounds = 0.25, .split256_cost = 0, .gated32_rows = 0, .gated32_rounds = 0,
    .gated64_rows = 48, .gathered_row_tiles = 4, .alone_rounds = 0, .alone_k_blocks = 32, .alone_rows = 0};
constexpr TacticConstants kPackedTactics = {
    .split_rows = 2, .split_rounds = 0.5, .split64_rounds = 0.5, .split32_rounds = 0, .split256_cost = 1.4, .gated32_rows = 12, .gated32_rounds = 2.25,
    .gated64_rows = 80, .gathered_row_tiles = 4, .alone_rounds = 2, .alone_k_blocks = 32, .alone_rows = 0};
constexpr TacticConstants kPackedFloat8Tactics = {
    .split_rows = 3, .split_rounds = 0.5, .split64_rounds = 0.5, .split32_rounds = 0, .split256_cost = 0, .gated32_rows = 0, .gated32_rounds = 0,
    .gated64_rows = 48, .gathered_row_tiles = 4, .alone_rounds = 0, .alone_k_blocks = 32, .alone_rows = 0};

}  // namespace moe::sm90
