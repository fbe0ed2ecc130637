#include "engine/tiles.h"

#include <cstring>
#include <vector>

namespace fallow {
namespace {

constexpr size_t kPiece = 16;  // bytes of four rows that alternate

// Calls move(in_row, in_tile, row) with the places of every unit, 4 bytes or 1, of [from, from + bytes).
template <class Move>
void for_units(Layout layout, size_t from, size_t bytes, const Move& move) {
  if (layout == Layout::kDwordTiles) {
    for (size_t i = from; i < from + bytes; i += 4)
      for (size_t r = 0; r < kTileRows; ++r) move(i, kTileRows * i + 4 * r, r);
    return;
  }
  for (size_t p = from; p < from + bytes; p += kPiece)
    for (size_t f = 0; f < kTileRows; f += 4)
      for (size_t j = 0; j < kPiece; ++j)
        for (size_t r = 0; r < 4; ++r) move(p + j, kTileRows * p + kPiece * f + 4 * j + r, f + r);
}

template <class Lay>
void in_tiles(uint8_t* rows, size_t n, size_t row_bytes, const Lay& lay) {
  const size_t bytes = kTileRows * row_bytes;
  std::vector<uint8_t> before(bytes);
  for (size_t i = 0; i < n; i += kTileRows) {
    std::memcpy(before.data(), rows + i * row_bytes, bytes);
    lay(before.data(), rows + i * row_bytes);
  }
}

}  // namespace

bool fits(Layout layout, size_t rows, size_t row_bytes) {
  return rows % kTileRows == 0 && row_bytes % (layout == Layout::kByteTiles ? kPiece : 4) == 0;
}

void to_tiles(Layout layout, uint8_t* rows, size_t n, size_t row_bytes) {
  const size_t unit = layout == Layout::kByteTiles ? 1 : 4;
  in_tiles(rows, n, row_bytes, [&](const uint8_t* from, uint8_t* to) {
    for_units(layout, 0, row_bytes, [&](size_t in_row, size_t in_tile, size_t r) {
      std::memcpy(to + in_tile, from + r * row_bytes + in_row, unit);
    });
  });
}

void to_rows(Layout layout, uint8_t* tiles, size_t n, size_t row_bytes) {
  in_tiles(tiles, n, row_bytes, [&](const uint8_t* from, uint8_t* to) {
    rows_of_tile(layout, from, 0, row_bytes, to);
  });
}

void rows_of_tile(Layout layout, const uint8_t* tile, size_t from, size_t bytes, uint8_t* rows) {
  const size_t unit = layout == Layout::kByteTiles ? 1 : 4;
  for_units(layout, from, bytes, [&](size_t in_row, size_t in_tile, size_t r) {
    std::memcpy(rows + r * bytes + in_row - from, tile + in_tile, unit);
  });
}

}  // namespace fallow
