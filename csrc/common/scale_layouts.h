// Where one-byte scales [rows, columns] lie for a kernel: torch_moe_ops/scale_layouts.py in C++. Free of torch.
//
// All layouts keep words: four columns of a row, the first in the lowest byte. A layout is an order of the rows (place
// q holds row `row_at(q)`) and of the words. All functions also run on the host.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace moe {

enum class ScaleLayout : int { words, words_mn, utccp, atom };

constexpr int64_t kAtomRows = 128;
constexpr int64_t kWordColumns = 4;

// Whether each 128 rows stand as a 32x4 matrix: row 32j + l at place 4l + j.
__host__ __device__ constexpr bool is_interleaved(ScaleLayout layout) {
  return layout == ScaleLayout::utccp || layout == ScaleLayout::atom;
}

__host__ __device__ constexpr int64_t row_at(ScaleLayout layout, int64_t place) {
  if (!is_interleaved(layout)) return place;
  const int64_t local = place % kAtomRows;
  return place - local + local % 4 * 32 + local / 4;
}

__host__ __device__ constexpr int64_t place_of(ScaleLayout layout, int64_t row) {
  if (!is_interleaved(layout)) return row;
  const int64_t local = row % kAtomRows;
  return row - local + local % 32 * 4 + local / 32;
}

// `words` is the number of words of a row; `stride_word`, of the MN-major layouts, the words from a column to the next.
__host__ __device__ constexpr int64_t word_index(ScaleLayout layout, int64_t place, int64_t word, int64_t words,
                                                 int64_t stride_word) {
  switch (layout) {
    case ScaleLayout::words: return place * words + word;
    case ScaleLayout::atom: return (place / kAtomRows * words + word) * kAtomRows + place % kAtomRows;
    default: return word * stride_word + place;
  }
}

// The row of atoms at which those of an expert start, from the expert's first row alone: since
// floor(a + b) >= floor(a) + floor(b), no expert reaches the next one's first atom.
__host__ __device__ constexpr int64_t first_atom_row(int64_t first_row, int64_t expert) {
  return (first_row + (kAtomRows - 1) * expert) / kAtomRows;
}

// A batch of matrices of scales, as strided bytes and as packed words.
struct ScaleArgs {
  uint8_t* scale = nullptr;
  int64_t matrices = 1, rows = 0, columns = 0;
  int64_t stride_matrix = 0, stride_row = 0, stride_column = 0;
  ScaleLayout layout = ScaleLayout::words;
  uint32_t* packed = nullptr;
  int64_t places = 0;  // rows of packed, padding included
  int64_t packed_matrix = 0, stride_word = 0;
  const int32_t* expert_offsets = nullptr;  // [num_experts + 1] or null; atom only
  int32_t num_experts = 0;

  // Of a row.
  __host__ __device__ int64_t words() const { return (columns + kWordColumns - 1) / kWordColumns; }
};

// The matrix row of an atom's place when each expert has atoms of its own; `args.rows` where there is none.
__host__ __device__ inline int64_t expert_row_at(const ScaleArgs& args, int64_t place) {
  const int64_t atom_row = place / kAtomRows;
  int low = 0, high = args.num_experts;  // first_atom_row(low) <= atom_row < first_atom_row(high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_atom_row(args.expert_offsets[middle], middle) <= atom_row ? low : high) = middle;
  }
  const int64_t begin = args.expert_offsets[low];
  const int64_t row = begin + row_at(ScaleLayout::atom, place) - first_atom_row(begin, low) * kAtomRows;
  return row >= begin && row < args.expert_offsets[low + 1] ? row : args.rows;
}

// Moves word `word` of line `line`, which counts the places of all matrices; nothing past their ends. Packing writes
// padding as 0, unpacking skips it.
template <ScaleLayout kLayout, bool kPack>
__host__ __device__ inline void move_word(const ScaleArgs& args, int64_t line, int64_t word) {
  const int64_t matrix = line / args.places, place = line % args.places;
  if (word >= args.words() || matrix >= args.matrices) return;
  const int64_t row = args.expert_offsets ? expert_row_at(args, place) : row_at(kLayout, place);
  const bool has_row = row < args.rows;
  uint32_t* packed =
      args.packed + matrix * args.packed_matrix + word_index(kLayout, place, word, args.words(), args.stride_word);
  uint8_t* scale = args.scale + matrix * args.stride_matrix + row * args.stride_row;
  uint32_t value = kPack || !has_row ? 0 : *packed;
#pragma unroll
  for (int i = 0; i < kWordColumns; ++i) {
    const int64_t column = word * kWordColumns + i;
    if (!has_row || column >= args.columns) continue;
    if constexpr (kPack) {
      value |= static_cast<uint32_t>(scale[column * args.stride_column]) << (8 * i);
    } else {
      scale[column * args.stride_column] = static_cast<uint8_t>(value >> (8 * i));
    }
  }
  if constexpr (kPack) *packed = value;
}

}  // namespace moe
