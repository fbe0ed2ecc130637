#include "engine/tiles.h"

#include <array>
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

// Of byte tiles of Q8_0: every block begins with its scales.
template <bool to_tile>
void move_blocks_8_0(std::conditional_t<to_tile, const uint8_t, uint8_t>* rows, size_t step, size_t from, size_t bytes,
                     std::conditional_t<to_tile, uint8_t, const uint8_t>* tile) {
  constexpr size_t kScale = sizeof(uint16_t);
  for (size_t b = 0; b < bytes; b += Q8_0::bytes) {
    for (size_t r = 0; r < kTileRows; ++r) {
      auto* in_row = rows + r * step + b;
      auto* in_tile = tile + kTileRows * (from + b) + kScale * r;
      if constexpr (to_tile) std::memcpy(in_tile, in_row, kScale);
      else std::memcpy(in_row, in_tile, kScale);
    }
    move_bytes<to_tile>(rows + b + kScale, step, from + b + kScale, Q8_0::bytes - kScale, tile);
  }
}

template <bool to_tile>
auto mover_of(Layout layout, uint32_t type) {
  if (layout == Layout::kDwordTiles) return move_dwords<to_tile>;
  return type == kQ8_0 ? move_blocks_8_0<to_tile> : move_bytes<to_tile>;
}

// Blocks of Q6_K are 210 bytes, of which a product needs three places at once. In tiles two of them come
// together: their d first, then of each its scales and, dword by dword, tops and both low parts that these
// belong to. In pairs of bytes: where the next one comes from.
constexpr size_t kPairOf6 = 2 * Q6_K::bytes;
constexpr auto kOrderOf6 = [] {
  std::array<uint8_t, kPairOf6 / 2> from{};
  size_t at = 0;
  const auto put = [&](size_t byte, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 2) from[at++] = static_cast<uint8_t>((byte + i) / 2);
  };
  put(208, 2);
  put(Q6_K::bytes + 208, 2);
  for (size_t block = 0; block < kPairOf6; block += Q6_K::bytes) {
    put(block + 192, 16);
    for (size_t half = 0; half < 2; ++half)
      for (size_t i = 0; i < 32; i += 4)
        for (const size_t byte : {128 + 32 * half, 64 * half, 64 * half + 32}) put(block + byte + i, 4);
  }
  return from;
}();

// A row's blocks in that order, or in their own again.
template <bool in_order>
void reorder_6(uint8_t* row, size_t bytes) {
  for (uint8_t* end = row + bytes; row < end; row += kPairOf6) {
    std::array<uint8_t, kPairOf6> pair;
    std::memcpy(pair.data(), row, kPairOf6);
    for (size_t i = 0; i < kOrderOf6.size(); ++i) {
      const size_t from = 2 * (in_order ? kOrderOf6[i] : i), to = 2 * (in_order ? i : kOrderOf6[i]);
      std::memcpy(row + to, pair.data() + from, 2);
    }
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
  return layout == Layout::kByteTiles && kernels.axpy_tiles[type] && (type == kQ8_0 || row_bytes % kPiece == 0);
}

void to_tiles(Layout layout, uint32_t type, uint8_t* rows, size_t n, size_t row_bytes) {
  const auto move = mover_of<true>(layout, type);
  in_tiles(rows, n, row_bytes, [&](uint8_t* from, uint8_t* to) {
    if (layout == Layout::kDwordTiles && type == kQ6_K) reorder_6<true>(from, kTileRows * row_bytes);
    move(from, row_bytes, 0, row_bytes, to);
  });
}

void to_rows(Layout layout, uint32_t type, uint8_t* tiles, size_t n, size_t row_bytes) {
  in_tiles(tiles, n, row_bytes,
           [&](uint8_t* from, uint8_t* to) { rows_of_tile(layout, type, from, 0, row_bytes, to); });
}

void rows_of_tile(Layout layout, uint32_t type, const uint8_t* tile, size_t from, size_t bytes, uint8_t* rows) {
  mover_of<false>(layout, type)(rows, bytes, from, bytes, tile);
  if (layout == Layout::kDwordTiles && type == kQ6_K) reorder_6<false>(rows, kTileRows * bytes);
}

void row_of_tiles(uint32_t type, const uint8_t* tiles, size_t row, size_t row_bytes, uint8_t* out) {
  const uint8_t* lane = tiles + row / kTileRows * kTileRows * row_bytes + 4 * (row % kTileRows);
  for (size_t i = 0; i < row_bytes; i += 4) std::memcpy(out + i, lane + kTileRows * i, 4);
  if (type == kQ6_K) reorder_6<false>(out, row_bytes);
}

}  // namespace fallow
