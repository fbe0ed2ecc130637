// Rows of the types whose blocks end in nibbles, cut in two planes: the upper two bits of every nibble
// with what stands before the nibbles, and the lower two bits. The first plane alone is a coarse row.
//
// A block of n nibble bytes b becomes n / 2 bytes t in the first and r in the second plane, so that
// joining takes whole bytes: t[j] holds the upper bits of b[j] (moved down) and of b[j + n / 2], r[j]
// the lower bits of b[j] and of b[j + n / 2] (moved up).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats.h"

namespace fallow {

struct PlaneFormat {
  uint32_t block;      // weights
  uint32_t header;     // bytes of a block before its nibbles
  uint32_t nibbles;    // bytes of nibbles

  uint32_t bytes() const { return header + nibbles; }
  uint32_t base_bytes() const { return header + nibbles / 2; }
  uint32_t rest_bytes() const { return nibbles / 2; }
};

// Null for a type that is not cut in planes.
static inline const PlaneFormat* find_planes(uint32_t type) {
  static constexpr PlaneFormat q4_0{32, 2, 16}, q4_1{32, 4, 16}, q5_0{32, 6, 16}, q5_1{32, 8, 16},
      q4_k{256, 16, 128}, q5_k{256, 48, 128};
  switch (type) {
    case kQ4_0: return &q4_0;
    case kQ4_1: return &q4_1;
    case kQ5_0: return &q5_0;
    case kQ5_1: return &q5_1;
    case kQ4_K: return &q4_k;
    case kQ5_K: return &q5_k;
    default: return nullptr;
  }
}

// What stands for the lower bits of a coarse row: 1 and 2 by turns, whose mean is that of 0 to 3, or 2
// and 1. Which one changes from row to row where rows are summed (down_proj_t), and from pair to pair
// of rows otherwise. Were it the same for both rows of a neuron, coarse rows of up_proj would read
// from every other dimension of the residual what coarse rows of down_proj add there: in two layers
// of Qwen2.5-Coder the divergence grows from 0.02 and 0.006 nats to 1.0 with both.
static inline uint8_t coarse_fill(size_t row, bool summed) {
  return (summed ? row : row / 2) % 2 ? 0x96 : 0x69;
}

// Static, as what is in formats.h: every kernel file has it in its own instructions. With sizes that
// the compiler knows a block of Q4_K takes some 10 instructions of AVX-512.
template <uint32_t header, uint32_t half>
static inline void join_blocks(const uint8_t* __restrict base, const uint8_t* __restrict rest,
                               uint8_t fill, size_t blocks, uint8_t* __restrict out) {
  uint8_t coarse[half];
  std::memset(coarse, fill, half);
  for (size_t i = 0; i < blocks; ++i) {
    const uint8_t* t = base + i * (header + half);
    const uint8_t* r = rest ? rest + i * half : coarse;
    uint8_t* b = out + i * (header + 2 * half);
    std::memcpy(b, t, header);
    t += header;
    b += header;
    for (uint32_t j = 0; j < half; ++j) {
      b[j] = static_cast<uint8_t>((t[j] & 0x33) << 2 | (r[j] & 0x33));
      b[j + half] = static_cast<uint8_t>((t[j] & 0xCC) | (r[j] & 0xCC) >> 2);
    }
  }
}

// Whole blocks from their planes; `rest` null: those of a coarse row with this fill.
static inline void join_planes(const PlaneFormat& f, const uint8_t* base, const uint8_t* rest,
                               uint8_t fill, size_t blocks, uint8_t* out) {
  if (f.nibbles == 128) {
    f.header == 16 ? join_blocks<16, 64>(base, rest, fill, blocks, out)
                   : join_blocks<48, 64>(base, rest, fill, blocks, out);
  } else {
    switch (f.header) {
      case 2: return join_blocks<2, 8>(base, rest, fill, blocks, out);
      case 4: return join_blocks<4, 8>(base, rest, fill, blocks, out);
      case 6: return join_blocks<6, 8>(base, rest, fill, blocks, out);
      default: return join_blocks<8, 8>(base, rest, fill, blocks, out);
    }
  }
}

}  // namespace fallow
