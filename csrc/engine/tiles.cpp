#include "engine/tiles.h"

#include <cstring>
#include <type_traits>
#include <vector>

namespace fallow {
namespace {

constexpr size_t kPiece = 16;  // bytes of four rows that alternate

// Bytes [from, from + bytes) of a tile's rows, which are `step` apart, to the tile or back.
template <bool to_tile>
void move_dwords(std::conditional_t<to_tile, const uint8_t, uint8_t>* rows, size_t step, size_t from, size_t bytes,
                 std::conditional_t<to_tile, uint8_t, const uint8_t>* tile) {
  for (size_t i = 0; i < bytes; i += 4)
    for (size_t r = 0; r < kTileRows; ++r) {
      auto* in_row = rows + r * step + i;
      auto* in_tile = tile + kTileRows * (from + i) + 4 * r;
      if constexpr (to_tile) std::memcpy(in_tile, in_row, 4);
      else std::memcpy(in_row, in_tile, 4);
    }
}

// Written so that compilers make vectors of it; formats are little-endian, and so are all processors here.
template <bool to_tile>
void move_bytes(std::conditional_t<to_tile, const uint8_t, uint8_t>* rows, size_t step, size_t from, size_t bytes,
                std::conditional_t<to_tile, uint8_t, const uint8_t>* tile) {
  for (size_t p = 0; p < bytes; p += kPiece)
    for (size_t f = 0; f < kTileRows; f += 4) {
      auto* in_tile = tile + kTileRows * (from + p) + kPiece * f;
      uint32_t dwords[kPiece] = {};
      uint8_t row[kPiece];
      if constexpr (!to_tile) std::memcpy(dwords, in_tile, sizeof dwords);
      for (size_t r = 0; r < 4; ++r) {
        auto* in_row = rows + (f + r) * step + p;
        if constexpr (to_tile) {
          std::memcpy(row, in_row, kPiece);
          for (size_t j = 0; j < kPiece; ++j) dwords[j] |= static_cast<uint32_t>(row[j]) << (8 * r);
        } else {
          for (size_t j = 0; j < kPiece; ++j) row[j] = static_cast<uint8_t>(dwords[j] >> (8 * r));
          std::memcpy(in_row, row, kPiece);
        }
      }
      if constexpr (to_tile) std::memcpy(in_tile, dwords, sizeof dwords);
    }
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

bool has_tiles(const Kernels& kernels, Layout layout, uint32_t type, size_t rows, size_t row_bytes) {
  if (rows % kTileRows != 0) return false;
  if (layout == Layout::kDwordTiles) return kernels.gemv_tiles[type] && row_bytes % 4 == 0;
  return layout == Layout::kByteTiles && kernels.axpy_tiles[type] && row_bytes % kPiece == 0;
}

void to_tiles(Layout layout, uint8_t* rows, size_t n, size_t row_bytes) {
  const auto move = layout == Layout::kByteTiles ? move_bytes<true> : move_dwords<true>;
  in_tiles(rows, n, row_bytes, [&](const uint8_t* from, uint8_t* to) { move(from, row_bytes, 0, row_bytes, to); });
}

void to_rows(Layout layout, uint8_t* tiles, size_t n, size_t row_bytes) {
  in_tiles(tiles, n, row_bytes,
           [&](const uint8_t* from, uint8_t* to) { rows_of_tile(layout, from, 0, row_bytes, to); });
}

void rows_of_tile(Layout layout, const uint8_t* tile, size_t from, size_t bytes, uint8_t* rows) {
  const auto move = layout == Layout::kByteTiles ? move_bytes<false> : move_dwords<false>;
  move(rows, bytes, from, bytes, tile);
}

void row_of_tiles(const uint8_t* tiles, size_t row, size_t row_bytes, uint8_t* out) {
  const uint8_t* lane = tiles + row / kTileRows * kTileRows * row_bytes + 4 * (row % kTileRows);
  for (size_t i = 0; i < row_bytes; i += 4) std::memcpy(out + i, lane + kTileRows * i, 4);
}

}  // namespace fallow
