// Weights laid out anew in memory, 16 rows side by side, so that products meet them in the order in
// which they lie: nothing is transposed, and memory is read in one stream. Of rows that a plan leaves
// out some, tiles would be read whole.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/runtime.h"

namespace fallow {

enum class Layout {
  kRows,
  kDwordTiles,  // dword i of row r is dword 16 i + r of its tile: for products with a vector. Dwords of Q6_K
                // are first brought into the order in which products need them
  kByteTiles,   // byte 16 p + j of row 4 f + r is byte 256 p + 64 f + 4 j + r: for sums of rows. Of Q8_0 it
                // is so within a block, behind the scales of its rows
};

// Whether there are products with a matrix that lies so, and whole tiles of it.
bool has_tiles(const Kernels& kernels, Layout layout, uint32_t type, size_t rows, size_t row_bytes);

// The share of n rows or neurons that falls to a worker, in whole tiles.
inline Share share_of_rows(size_t n, int worker, int workers) {
  const Share tiles = share_of(pieces(n, kTileRows), worker, workers);
  return {std::min(n, tiles.begin * kTileRows), std::min(n, tiles.end * kTileRows)};
}

// Lays out n rows in place, from kRows to another way, and back.
void to_tiles(Layout layout, uint32_t type, uint8_t* rows, size_t n, size_t row_bytes);
void to_rows(Layout layout, uint32_t type, uint8_t* tiles, size_t n, size_t row_bytes);

// Bytes [from, from + bytes) of the rows of a tile, one after the other; for kByteTiles both
// multiples of 16, or blocks of Q8_0; for kDwordTiles multiples of 4, of two blocks of Q6_K.
void rows_of_tile(Layout layout, uint32_t type, const uint8_t* tile, size_t from, size_t bytes, uint8_t* rows);

// One row of a matrix in dword tiles.
void row_of_tiles(uint32_t type, const uint8_t* tiles, size_t row, size_t row_bytes, uint8_t* out);

}  // namespace fallow
