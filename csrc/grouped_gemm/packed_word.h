// Eight 4-bit codes of packed weights -> the bits of bfloat16 numbers; torch_moe_ops/packed_weights.py has the layout. Host code, too, so that a
// CPU tests it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace moe {

__host__ __device__ __forceinline__ uint32_t rotate_left(uint32_t x, int by) { return x << by | x >> (32 - by); }

// The four registers of one step of 16 k, two numbers each, without their scales, in 9 instructions.
__host__ __device__ __forceinline__ void unpack_word(uint32_t word, uint32_t (&registers)[4]) {
  constexpr uint32_t kBits = 0x81C081C0, kLowest = 0x00400040;
  registers[0] = word & kBits;
  registers[1] = (word << 4) & kBits;
  registers[2] = rotate_left(word, 10) & kBits;
  registers[3] = (rotate_left(word, 14) & (kBits ^ kLowest)) | ((word << 6) & kLowest);
}

}  // namespace moe
