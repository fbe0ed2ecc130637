#include "stats/bits.h"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "parallel.h"

namespace fallow {
namespace {

// Rows that meet a tile of the other side before the next tile: 14,336 bits of each are 115 KB, in the
// second cache, while the tile stays in the first.
constexpr size_t kRowBlock = 64;
// Counters of a byte are emptied after so many rows.
constexpr size_t kFullByte = 255;

// Calls use(first row, first other, counts of the tile) for all tiles of rows [begin, end) with all
// others. Behind the last row or other a tile repeats it.
template <class Use>
void for_tiles(const Kernels& kernels, BitRows rows, size_t begin, size_t end, BitRows others,
               const Use& use) {
  const auto tile_of = [](BitRows from, size_t first, size_t last) {
    std::array<const uint64_t*, kBitTile> found;
    for (size_t i = 0; i < kBitTile; ++i) found[i] = from.row(std::min(first + i, last - 1));
    return found;
  };
  uint32_t counts[kBitTile * kBitTile];
  for (size_t c = 0; c < others.n; c += kBitTile) {
    const auto other = tile_of(others, c, others.n);
    for (size_t r = begin; r < end; r += kBitTile) {
      const auto row = tile_of(rows, r, end);
      kernels.and_tile(row.data(), other.data(), rows.words, counts);
      use(r, c, counts);
    }
  }
}

// The best label so far of each row of a block, for each of the kBitTile columns of the tiles.
struct Best {
  int32_t score[kRowBlock][kBitTile], label[kRowBlock][kBitTile];

  Best() {
    for (auto& row : score) std::fill(std::begin(row), std::end(row), kNone);
  }

  static constexpr int32_t kNone = std::numeric_limits<int32_t>::min();

  // After some tiles few rows find a better label. The inner loops have no branches, so that the
  // compiler takes four columns at once.
  void add(size_t first, const int32_t* scores, int32_t label_of_first) {
    for (size_t r = 0; r < kBitTile; ++r) {
      int32_t some = 0;
      for (size_t c = 0; c < kBitTile; ++c)
        some |= -(scores[r * kBitTile + c] > score[first + r][c]);
      if (!some) continue;
      for (size_t c = 0; c < kBitTile; ++c) {
        int32_t &best = score[first + r][c], &best_label = label[first + r][c];
        const int32_t found = scores[r * kBitTile + c];
        const bool better = found > best;
        best = better ? found : best;
        best_label = better ? label_of_first + static_cast<int32_t>(c) : best_label;
      }
    }
  }

  void add(size_t row, int32_t found, int32_t found_label) {
    if (found <= score[row][0]) return;
    score[row][0] = found;
    label[row][0] = found_label;
  }

  size_t column(size_t row) const {
    size_t best = 0;
    for (size_t c = 1; c < kBitTile; ++c)
      if (score[row][c] > score[row][best] ||
          (score[row][c] == score[row][best] && score[row][c] != kNone &&
           label[row][c] < label[row][best]))
        best = c;
    return best;
  }
};

// Eight bits to the lowest bits of eight bytes.
constexpr std::array<uint64_t, 256> kSpread = [] {
  std::array<uint64_t, 256> spread{};
  for (size_t byte = 0; byte < 256; ++byte)
    for (size_t bit = 0; bit < 8; ++bit)
      spread[byte] |= static_cast<uint64_t>(byte >> bit & 1) << (8 * bit);
  return spread;
}();

// Counters of every bit, eight bytes in a word.
class ByteCounters {
 public:
  explicit ByteCounters(size_t words) : counters_(8 * words) {}

  void add(const uint64_t* row) {
    for (size_t i = 0; i < counters_.size(); ++i) counters_[i] += kSpread[row[i / 8] >> (8 * (i % 8)) & 255];
    ++rows_;
  }

  bool full() const { return rows_ == kFullByte; }

  void empty_into(uint32_t* counts) {
    for (size_t i = 0; i < counters_.size(); ++i)
      for (size_t bit = 0; bit < 8; ++bit)
        counts[8 * i + bit] += static_cast<uint32_t>(counters_[i] >> (8 * bit) & 255);
    std::fill(counters_.begin(), counters_.end(), 0);
    rows_ = 0;
  }

 private:
  std::vector<uint64_t> counters_;
  size_t rows_ = 0;
};

}  // namespace

void nearest(const Kernels& kernels, BitRows rows, BitRows codebook, size_t planes,
             const int32_t* offset, int32_t* labels, int32_t* overlaps, int n_threads) {
  const size_t n_labels = codebook.n / planes;
  // Behind the last label one that nothing is near to.
  std::vector<int32_t> offsets(offset, offset + n_labels);
  offsets.resize(n_labels + kBitTile, std::numeric_limits<int32_t>::max() / 2);
  parallel_ranges((rows.n + kRowBlock - 1) / kRowBlock, n_threads, [&](size_t b, size_t e, int) {
    for (size_t block = b; block < e; ++block) {
      const size_t begin = block * kRowBlock, end = std::min(begin + kRowBlock, rows.n);
      Best best;
      for_tiles(kernels, rows, begin, end, codebook, [&](size_t r, size_t c, uint32_t* counts) {
        int32_t scores[kBitTile * kBitTile];
        if (planes == 1) {
          for (size_t i = 0; i < kBitTile * kBitTile; ++i)
            scores[i] = static_cast<int32_t>(2 * counts[i]) - offsets[c + i % kBitTile];
          best.add(r - begin, scores, static_cast<int32_t>(c));
          return;
        }
        static_assert(kWeightPlanes == kBitTile);
        const size_t label = c / kWeightPlanes;
        for (size_t i = 0; i < kBitTile; ++i) {
          int32_t weighted = 0;
          for (size_t p = 0; p < kWeightPlanes; ++p)
            weighted += static_cast<int32_t>(counts[i * kBitTile + p] << p);
          best.add(r - begin + i, 2 * weighted - offsets[label], static_cast<int32_t>(label));
        }
      });
      for (size_t r = begin; r < end; ++r) {
        const size_t column = best.column(r - begin);
        labels[r] = best.label[r - begin][column];
        overlaps[r] = (best.score[r - begin][column] + offsets[static_cast<size_t>(labels[r])]) / 2;
      }
    }
  });
}

void overlaps(const Kernels& kernels, BitRows rows, BitRows others, uint32_t* counts,
              int n_threads) {
  parallel_ranges((rows.n + kRowBlock - 1) / kRowBlock, n_threads, [&](size_t b, size_t e, int) {
    for (size_t block = b; block < e; ++block) {
      const size_t end = std::min((block + 1) * kRowBlock, rows.n);
      for_tiles(kernels, rows, block * kRowBlock, end, others,
                [&](size_t r, size_t c, const uint32_t* tile) {
                  for (size_t i = 0; i < std::min(kBitTile, end - r); ++i)
                    std::copy_n(tile + i * kBitTile, std::min(kBitTile, others.n - c),
                                counts + (r + i) * others.n + c);
                });
    }
  });
}

void add_rows(BitRows rows, const int32_t* labels, size_t n_labels, uint32_t* counts,
              int n_threads) {
  // Rows by label: those of label i are order[first[i]] to order[first[i + 1] - 1].
  std::vector<size_t> first(n_labels + 1);
  for (size_t r = 0; r < rows.n; ++r)
    if (labels[r] >= 0) ++first[static_cast<size_t>(labels[r]) + 1];
  for (size_t i = 0; i < n_labels; ++i) first[i + 1] += first[i];
  std::vector<size_t> order(first.back()), next(first.begin(), first.end() - 1);
  for (size_t r = 0; r < rows.n; ++r)
    if (labels[r] >= 0) order[next[static_cast<size_t>(labels[r])]++] = r;

  // A label is one thread's; each takes about as many rows.
  parallel_ranges(static_cast<size_t>(n_threads), n_threads, [&](size_t b, size_t e, int) {
    ByteCounters counters(rows.words);
    const auto begins = [&](size_t worker) {
      const size_t row = order.size() * worker / static_cast<size_t>(n_threads);
      return static_cast<size_t>(std::lower_bound(first.begin(), first.end() - 1, row) -
                                 first.begin());
    };
    const size_t end = e == static_cast<size_t>(n_threads) ? n_labels : begins(e);
    for (size_t label = begins(b); label < end; ++label) {
      uint32_t* of_label = counts + label * 64 * rows.words;
      for (size_t i = first[label]; i < first[label + 1]; ++i) {
        counters.add(rows.row(order[i]));
        if (counters.full()) counters.empty_into(of_label);
      }
      if (first[label] < first[label + 1]) counters.empty_into(of_label);
    }
  });
}

}  // namespace fallow
