// Products with 256-bit registers. A format keeps 16 bytes, a piece, for columns of four bits and more: one
// in the low nibbles, another in the high ones, what is above four bits elsewhere. Pieces of several
// rows are arranged in one of two ways:
//
// - A row per lane, for products with x, as avx512_lanes.h has them: 16 bytes of each of 8 rows become
//   four registers whose lane r holds a dword of row r; four columns of all the rows are byte products
//   with four values of x, sums never leave their lanes, and 8 rows are 8 memory streams.
// - Two rows side by side, for sums of rows: a byte product is then what two rows add to a column.
//
// Either way sums stay in 16 bits for as long as those hold them.
#pragma once

#include <immintrin.h>

#include <utility>

#include "formats/formats.h"
#include "kernels/shared.h"

namespace fallow {

void add_avx2_bytes(Kernels& table);  // avx2_bytes.cpp

namespace {

constexpr size_t kLanes = 8;
// Rows that are summed in integers before they become floats.
constexpr size_t kSummed = 16;

FALLOW_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
FALLOW_INLINE __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
FALLOW_INLINE __m256i side_by_side(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
FALLOW_INLINE __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
FALLOW_INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi32(v, 4)); }

// What the compiler is to have in a register here. Left to itself it puts sums off until they are used,
// and half of their parts into memory: 0.6 of the speed (GCC 12, Zen 4).
FALLOW_INLINE __m256i now(__m256i v) {
  asm("" : "+x"(v));
  return v;
}

FALLOW_INLINE int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

// Of magnitudes, as integers, of which NaN's is the largest.
FALLOW_INLINE __m256 max_of(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

// The largest magnitude of v, in every lane.
FALLOW_INLINE __m256 largest_lane(__m256 v) {
  v = max_of(v, _mm256_permute2f128_ps(v, v, 1));
  v = max_of(v, _mm256_permute_ps(v, 0x4E));
  return max_of(v, _mm256_permute_ps(v, 0xB1));
}

// The half-precision numbers in the low halves of dwords.
FALLOW_INLINE __m256 low_halves(__m256i v) {
  const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xFFFF));
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}

// Bits that `mask` has in every byte, shifted there to the left, or to the right if negative, and put to v.
template <int left>
FALLOW_INLINE __m256i with_bits(__m256i v, __m256i bits, char mask) {
  if constexpr (left > 0) bits = _mm256_slli_epi32(bits, left);
  if constexpr (left < 0) bits = _mm256_srli_epi32(bits, -left);
  return _mm256_or_si256(v, _mm256_and_si256(bits, _mm256_set1_epi8(mask)));
}

// Calls some.operator()<i>() for i in [0, n).
template <int n, class Some>
FALLOW_INLINE void unrolled(const Some& some) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (some.template operator()<i>(), ...);
  }(std::make_integer_sequence<int, n>());
}

// Of 32 bits in every lane, one of a column each, two pieces of bytes that are 0 or 16.
FALLOW_INLINE void fifth_bits(__m256i bits, __m256i* out) {
  const __m256i sixteen = _mm256_set1_epi8(16);
  unrolled<8>([&]<int i>() {
    const __m256i byte = _mm256_shuffle_epi8(bits, _mm256_set_epi32(
        0x0C0C0C0C + 0x01010101 * (i / 2), 0x08080808 + 0x01010101 * (i / 2),
        0x04040404 + 0x01010101 * (i / 2), 0x01010101 * (i / 2), 0x0C0C0C0C + 0x01010101 * (i / 2),
        0x08080808 + 0x01010101 * (i / 2), 0x04040404 + 0x01010101 * (i / 2), 0x01010101 * (i / 2)));
    const __m256i bit = _mm256_set1_epi32(static_cast<int>(i % 2 ? 0x80402010 : 0x08040201));
    out[i] = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit), sixteen);
  });
}

// 8 rows, a row per lane.
struct InLanes {
  static constexpr size_t registers = 4;  // of a piece
  const uint8_t* const* rows;

  // out[i] = dword i of the piece at `at` of every row.
  FALLOW_INLINE void load(size_t at, __m256i* out) const {
    __m256i v[4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) v[r] = side_by_side(load128(rows[r] + at), load128(rows[r + 4] + at));
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
    const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm256_unpacklo_epi64(a, b);
    out[1] = _mm256_unpackhi_epi64(a, b);
    out[2] = _mm256_unpacklo_epi64(c, d);
    out[3] = _mm256_unpackhi_epi64(c, d);
  }
  // The dword at `at` of every row.
  FALLOW_INLINE __m256i dword(size_t at) const {
    const auto of = [&](size_t r) { return static_cast<int>(load_u32(rows[r] + at)); };
    return _mm256_set_epi32(of(7), of(6), of(5), of(4), of(3), of(2), of(1), of(0));
  }
  // The half-precision number at `at` of every row.
  FALLOW_INLINE __m256 half(size_t at) const {
    const auto of = [&](size_t r) { return static_cast<short>(load_u16(rows[r] + at)); };
    return _mm256_cvtph_ps(_mm_set_epi16(of(7), of(6), of(5), of(4), of(3), of(2), of(1), of(0)));
  }
  FALLOW_INLINE void fifth(size_t at, __m256i* out) const { fifth_bits(dword(at), out); }
};

// 8 rows of a block in a tile, whose dwords lie as InLanes arranges them. `odd`: the block begins in the
// middle of a dword, as every second one of a format does whose blocks are not whole dwords.
template <bool odd>
struct InTile {
  static constexpr size_t registers = 4;
  const uint8_t* first;  // of the tile's 16 rows: the dwords in which the block begins in these 8

  FALLOW_INLINE __m256i whole_dword(size_t at) const { return load256(first + kTileRows * at); }
  FALLOW_INLINE __m256i dword(size_t at) const {
    at += odd ? 2 : 0;
    if (at % 4 == 0) return whole_dword(at);
    return _mm256_or_si256(_mm256_srli_epi32(whole_dword(at - 2), 16), _mm256_slli_epi32(whole_dword(at + 2), 16));
  }
  FALLOW_INLINE void load(size_t at, __m256i* out) const {
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) out[i] = dword(at + 4 * i);
  }
  FALLOW_INLINE void fifth(size_t at, __m256i* out) const { fifth_bits(dword(at), out); }
  FALLOW_INLINE __m256 half(size_t at) const {
    at += odd ? 2 : 0;
    const __m256i v = whole_dword(at / 4 * 4);
    return low_halves(at % 4 ? _mm256_srli_epi32(v, 16) : v);
  }
};

// Calls some.operator()<odd>(first, column) for every block of a tile: the first 8 rows' InTile<odd> begins
// at `first`, that of the others 4 * kLanes bytes later. Blocks that are not whole dwords come in pairs, since
// rows are whole dwords.
template <class F, class Some>
FALLOW_INLINE void for_blocks_of_tile(const uint8_t* tile, size_t k, const Some& some) {
  constexpr size_t together = F::bytes % 4 ? 2 : 1;
  for (size_t at = 0; at < k; at += together * F::block, tile += kTileRows * together * F::bytes) {
    some.template operator()<false>(tile, at);
    if constexpr (together == 2)
      some.template operator()<true>(tile + kTileRows * (F::bytes - 2), at + F::block);
  }
}

// Rows r and r + 1 of `rows` side by side in the low half of a register, r + 4 and r + 5 in the high one.
struct InPairs {
  static constexpr size_t registers = 2;
  const uint8_t* const* rows;

  static FALLOW_INLINE void interleave(__m256i even, __m256i odd, __m256i* out) {
    out[0] = _mm256_unpacklo_epi8(even, odd);
    out[1] = _mm256_unpackhi_epi8(even, odd);
  }
  FALLOW_INLINE void load(size_t at, __m256i* out) const {
    interleave(side_by_side(load128(rows[0] + at), load128(rows[4] + at)),
               side_by_side(load128(rows[1] + at), load128(rows[5] + at)), out);
  }
  FALLOW_INLINE void fifth(size_t at, __m256i* out) const {
    const auto piece = [&](size_t r, int64_t from) {
      const auto bits = [&](size_t row) { return _mm_cvtsi32_si128(static_cast<int>(load_u32(rows[row] + at))); };
      const __m256i both = side_by_side(bits(r), bits(r + 4));
      const __m256i byte = _mm256_shuffle_epi8(
          both, _mm256_set_epi64x(from + 0x0101010101010101, from, from + 0x0101010101010101, from));
      const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
      return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit), _mm256_set1_epi8(16));
    };
    interleave(piece(0, 0), piece(1, 0), out);
    interleave(piece(0, 0x0202020202020202), piece(1, 0x0202020202020202), out + 2);
  }
};

// 8 rows of a tile of bytes, whose pieces have four rows' bytes of a column side by side.
struct InByteTile {
  static constexpr size_t registers = 4;
  const uint8_t* first;  // of the tile's 16 rows: these 8 begin here

  FALLOW_INLINE void load(size_t at, __m256i* out) const {
    const __m256i rows_first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const uint8_t* from = first + kTileRows * at;
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i)
      out[i] = _mm256_shuffle_epi8(side_by_side(load128(from + 16 * i), load128(from + 64 + 16 * i)), rows_first);
  }
};

// What follows are formats. Piece i is at byte at(i), its low nibbles are columns from low(i) on and its
// high ones those `apart` further. tops(a, t) loads what is above four bits, arranged as `a` does;
// split<i, n>(t, q, v, ...) makes weights of register q of n that the piece has. `most` products fit
// 16 bits. scale<g>() and minimum<g>() are those of group g in 8 rows.

// Blocks of 32.
template <class F>
struct Lanes32 : F {
  static constexpr size_t halves = F::has_min ? 4 : 2;
  static constexpr bool has_fifth = F::bytes == halves + 20;
  static constexpr int pieces = 1, most = has_fifth ? 4 : 8;
  static constexpr size_t top_pieces = has_fifth ? 2 : 0, apart = 16;
  static constexpr size_t at(int) { return F::bytes - 16; }
  static constexpr size_t low(int) { return 0; }

  template <class Arranged>
  static FALLOW_INLINE void tops(const Arranged& rows, __m256i* t) {
    if constexpr (has_fifth) rows.fifth(halves, t);
  }
  template <int, size_t n>
  static FALLOW_INLINE void split(const __m256i* tops, size_t q, __m256i v, __m256i& low, __m256i& high) {
    low = low_nibbles(v);
    high = high_nibbles(v);
    if constexpr (has_fifth) {
      low = _mm256_or_si256(low, tops[q]);
      high = _mm256_or_si256(high, tops[n + q]);
    }
  }

  class Scales {
   public:
    template <class Rows>
    FALLOW_INLINE explicit Scales(const Rows& rows) : s_(rows.half(0)), m_(s_) {
      if constexpr (F::has_min) m_ = _mm256_xor_ps(rows.half(2), _mm256_set1_ps(-0.0f));
    }
    FALLOW_INLINE void multiply(__m256 c) {
      s_ = _mm256_mul_ps(s_, c);
      m_ = _mm256_mul_ps(m_, c);
    }
    template <int>
    FALLOW_INLINE __m256 scale() const { return s_; }
    template <int>
    FALLOW_INLINE __m256 minimum() const { return m_; }

   private:
    __m256 s_, m_;
  };
};

// Q4_K and Q5_K.
template <class F>
struct LanesK : F {
  static constexpr bool has_fifth = F::type == kQ5_K;
  static constexpr int pieces = 8, most = has_fifth ? 4 : 8;
  static constexpr size_t top_pieces = has_fifth ? 2 : 0, apart = 32;
  static constexpr size_t at(int i) { return F::bytes - 128 + 16 * static_cast<size_t>(i); }
  static constexpr size_t low(int i) { return static_cast<size_t>(64 * (i / 2) + 16 * (i % 2)); }

  template <class Arranged>
  static FALLOW_INLINE void tops(const Arranged& rows, __m256i* t) {
    if constexpr (has_fifth) {
      rows.load(16, t);
      rows.load(32, t + Arranged::registers);
    }
  }
  // Of sums: the first column of piece 2 p + r, where its tops are, and how far to the right.
  static constexpr size_t column(size_t p, size_t r) { return 64 * p + 16 * r; }
  static constexpr size_t top(size_t, size_t r) { return r; }
  static constexpr size_t shift(size_t p) { return 2 * p; }
  static FALLOW_INLINE void join(__m256i tops, __m256i v, __m256i& low, __m256i& high) {
    low = low_nibbles(v);
    high = high_nibbles(v);
    if constexpr (has_fifth) {
      low = with_bits<4>(low, tops, 16);
      high = with_bits<3>(high, tops, 16);
    }
  }
  // Bit g of a byte of `tops` is the fifth one of group g.
  template <int i, size_t n>
  static FALLOW_INLINE void split(const __m256i* tops, size_t q, __m256i v, __m256i& low, __m256i& high) {
    low = low_nibbles(v);
    high = high_nibbles(v);
    if constexpr (has_fifth) {
      constexpr int g = i / 2 * 2;
      low = with_bits<4 - g>(low, tops[n * (i % 2) + q], 16);
      high = with_bits<3 - g>(high, tops[n * (i % 2) + q], 16);
    }
  }

  class Scales {
   public:
    template <class Rows>
    FALLOW_INLINE explicit Scales(const Rows& rows) {
      __m256i t[4];
      rows.load(0, t);
      const __m256i six = _mm256_set1_epi8(63);
      d_ = low_halves(t[0]);
      dmin_ = low_halves(_mm256_srli_epi32(t[0], 16));
      s_[0] = _mm256_and_si256(t[1], six);
      m_[0] = _mm256_and_si256(t[2], six);
      s_[1] = with_bits<-2>(low_nibbles(t[3]), t[1], 0x30);
      m_[1] = with_bits<-2>(high_nibbles(t[3]), t[2], 0x30);
    }
    FALLOW_INLINE void multiply(__m256 c) {
      d_ = _mm256_mul_ps(d_, c);
      dmin_ = _mm256_mul_ps(dmin_, c);
    }
    template <int g>
    FALLOW_INLINE __m256 scale() const { return _mm256_mul_ps(d_, byte<g % 4>(s_[g / 4])); }
    template <int g>
    FALLOW_INLINE __m256 minimum() const { return _mm256_mul_ps(dmin_, byte<g % 4>(m_[g / 4])); }

   private:
    template <int i>
    static FALLOW_INLINE __m256 byte(__m256i v) {
      return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(
          v, _mm256_set_epi32(static_cast<int>(0x8080800C) + i, static_cast<int>(0x80808008) + i,
                              static_cast<int>(0x80808004) + i, static_cast<int>(0x80808000) + i,
                              static_cast<int>(0x8080800C) + i, static_cast<int>(0x80808008) + i,
                              static_cast<int>(0x80808004) + i, static_cast<int>(0x80808000) + i)));
    }

    __m256i s_[2], m_[2];
    __m256 d_, dmin_;
  };
};

struct Lanes6_K : Q6_K {
  static constexpr size_t top_pieces = 4, apart = 64;
  static constexpr size_t at(int i) { return 16 * static_cast<size_t>(i); }

  template <class Arranged>
  static FALLOW_INLINE void tops(const Arranged& rows, __m256i* t) {
    for (size_t i = 0; i < top_pieces; ++i) rows.load(128 + 16 * i, t + Arranged::registers * i);
  }
  // Two bits each of columns that are 32 apart.
  static constexpr size_t column(size_t p, size_t r) { return 128 * (p / 2) + 32 * (p % 2) + 16 * r; }
  static constexpr size_t top(size_t p, size_t r) { return p / 2 * 2 + r; }
  static constexpr size_t shift(size_t p) { return 2 * (p % 2); }
  static FALLOW_INLINE void join(__m256i tops, __m256i v, __m256i& low, __m256i& high) {
    low = with_bits<4>(low_nibbles(v), tops, 0x30);
    high = with_bits<0>(high_nibbles(v), tops, 0x30);
  }

  class Scales {
   public:
    template <class Rows>
    FALLOW_INLINE explicit Scales(const Rows& rows) : d_(rows.half(208)) { rows.load(192, s_); }
    FALLOW_INLINE void multiply(__m256 c) { d_ = _mm256_mul_ps(d_, c); }
    template <int g>
    FALLOW_INLINE __m256 scale() const {
      const __m256i s = _mm256_srai_epi32(_mm256_slli_epi32(s_[g / 4], 24 - 8 * (g % 4)), 24);
      return _mm256_mul_ps(d_, _mm256_cvtepi32_ps(s));
    }

   private:
    __m256i s_[4];
    __m256 d_;
  };
};

// Rows that come after those at work. They are asked for in the second cache, since they and those at
// work do not fit the first, 256 columns of some rows at a time: of all rows at once, what is asked for
// kept what is needed waiting.
template <class F, size_t n>
struct Later {
  const uint8_t* rows[n];

  // Part i of 8.
  FALLOW_INLINE void ask(size_t i) {
    for (size_t r = n / 8 * i; r < n / 8 * (i + 1); ++r) prefetch(rows[r], 256 / F::block * F::bytes);
  }
};

// Blocks of a tile come in one stream, which is asked for in step with the work, kAhead bytes before it is
// needed. Of plain reading by two threads of Zen 3, products with Q4_K, Q8_0 and Q5_0 reach 0.99, 0.83 and
// 0.85 so, without it 0.83, 0.79 and 0.77, sums of Q5_K 0.67 instead of 0.47; asked for twice as far ahead
// Q4_K's reach 0.80, and a block at once no more than without.
template <class F>
struct Stream {
  static constexpr size_t kAhead = 1024, lines = (kTileRows * F::bytes + 63) / 64;
  const uint8_t* block;
  size_t ahead = kAhead;

  // Part i of 8, of blocks of 32 all.
  FALLOW_INLINE void ask(size_t i) const {
    const size_t from = F::block > 32 ? lines * i / 8 : 0, to = F::block > 32 ? lines * (i + 1) / 8 : lines;
    for (size_t line = from; line < to; ++line) __builtin_prefetch(block + ahead + 64 * line, 0, 2);
  }
};

FALLOW_INLINE __m256i four_of(const int8_t* x) {
  int32_t v;
  __builtin_memcpy(&v, x, sizeof v);
  return _mm256_set1_epi32(v);
}

// Four columns of x.
template <bool one>
struct FourDigits {
  __m256i high, low;

  FALLOW_INLINE FourDigits(const Activation& x, size_t column) : high(four_of(x.high + column)) {
    if constexpr (!one) low = four_of(x.low + column);
  }
};

// The products of a group of columns with the digits of x, or the upper one; `most` of them fit 16 bits.
template <int most, bool one>
class LaneGroup {
 public:
  // Product i: four columns of all rows.
  FALLOW_INLINE void add(size_t i, __m256i weights, const FourDigits<one>& x) {
    const __m256i high = _mm256_maddubs_epi16(weights, x.high);
    high_ = now(i % most == 0 ? high : _mm256_add_epi16(high_, high));
    if constexpr (!one) {
      const __m256i low = _mm256_maddubs_epi16(weights, x.low);
      low_ = now(i % most == 0 ? low : _mm256_add_epi16(low_, low));
    }
    if (i % most == most - 1) widen(i < most);
  }
  // The sum of 256 * high + low, of n products.
  FALLOW_INLINE __m256 sum(size_t n) {
    if (n % most != 0) widen(n < most);
    return _mm256_cvtepi32_ps(all_);
  }

 private:
  FALLOW_INLINE void widen(bool first) {
    __m256i both = _mm256_madd_epi16(high_, _mm256_set1_epi16(256));
    if constexpr (!one) both = _mm256_add_epi32(both, _mm256_madd_epi16(low_, _mm256_set1_epi16(1)));
    all_ = first ? both : _mm256_add_epi32(all_, both);
  }

  __m256i high_, low_, all_;
};

// What 8 rows make of x is sum - minima, the latter times the offset for formats without minima.
struct LaneSums {
  __m256 sum = _mm256_setzero_ps(), minima = _mm256_setzero_ps();

  template <class F>
  FALLOW_INLINE void store(float* y) const {
    const __m256 factor = _mm256_set1_ps(F::has_min ? 1.0f : static_cast<float>(F::offset));
    _mm256_storeu_ps(y, _mm256_fnmadd_ps(minima, factor, sum));
  }
};

// Formats whose weights are signed bytes, stored or looked up. Of a group of 32 columns there are `raws` pieces
// at at(g, i), each of which has bytes of `parts` times 16 columns.

struct Signed8_0 : Q8_0 {
  static constexpr int raws = 2, parts = 1;
  static constexpr size_t at(int, int i) { return 2 + 16 * static_cast<size_t>(i); }
  template <int>
  static FALLOW_INLINE __m256i bytes_of(__m256i v) { return v; }

  class Scales {
   public:
    template <class Rows>
    FALLOW_INLINE explicit Scales(const Rows& rows) : s_(rows.half(0)) {}
    template <int>
    FALLOW_INLINE __m256 scale() const { return s_; }

   private:
    __m256 s_;
  };
};

template <class F>
struct LookedUp : F {
  static constexpr int raws = 1, parts = 2;
  static constexpr size_t at(int g, int) { return F::bytes - 16 * (F::block / 32 - static_cast<size_t>(g)); }
  template <int part>
  static FALLOW_INLINE __m256i bytes_of(__m256i v) {
    const __m256i values = _mm256_broadcastsi128_si256(load128(F::values));
    return _mm256_shuffle_epi8(values, part ? high_nibbles(v) : low_nibbles(v));
  }

  class Scales {
   public:
    template <class Rows>
    FALLOW_INLINE explicit Scales(const Rows& rows) {
      if constexpr (F::type == kMXFP4) {
        const __m256i e = _mm256_and_si256(rows.dword(0), _mm256_set1_epi32(0xFF));
        const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
        const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
        const __m256i is_normal = _mm256_cmpgt_epi32(e, _mm256_set1_epi32(1));
        d_ = _mm256_castsi256_ps(_mm256_blendv_epi8(small, normal, is_normal));
      } else {
        d_ = rows.half(0);
      }
      if constexpr (F::type == kIQ4_XS) {
        high_ = _mm256_srli_epi32(rows.dword(0), 16);
        low_ = rows.dword(4);
      }
    }
    template <int g>
    FALLOW_INLINE __m256 scale() const {
      if constexpr (F::type != kIQ4_XS) return d_;
      const __m256i low = _mm256_and_si256(_mm256_srli_epi32(low_, 4 * g), _mm256_set1_epi32(15));
      const __m256i high = _mm256_and_si256(_mm256_slli_epi32(_mm256_srli_epi32(high_, 2 * g), 4), _mm256_set1_epi32(0x30));
      const __m256i scale = _mm256_sub_epi32(_mm256_or_si256(low, high), _mm256_set1_epi32(32));
      return _mm256_mul_ps(d_, _mm256_cvtepi32_ps(scale));
    }

   private:
    __m256 d_;
    __m256i high_, low_;
  };
};

template <class F>
constexpr bool kIsSigned = F::centre == 128;

// One block of such a format of n times 8 rows. Weights and x, both of its digits at once, meet as 16-bit
// values: those of even columns, and those of odd ones.
template <class F, class Rows, size_t n, class Ask>
FALLOW_INLINE void dot_block_signed(const Rows (&rows)[n], const Ask& ask, const Activation& x, size_t block,
                                    LaneSums (&sums)[n]) {
  const auto even = [](__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); };
  const auto odd = [](__m256i v) { return _mm256_srai_epi16(v, 8); };
  const auto with_scales = [&]<size_t... h>(std::index_sequence<h...>, const auto& some) {
    const typename F::Scales scales[n] = {typename F::Scales(rows[h])...};
    some(scales);
  };
  with_scales(std::make_index_sequence<n>(), [&](const typename F::Scales (&scales)[n]) __attribute__((always_inline)) {
    unrolled<F::block / 32>([&]<int g>() {
      const size_t column = block + 32 * g;
      ask(column / 32 % 8);
      alignas(32) int32_t of_even[8], of_odd[8];
      const __m256i high = load256(x.high + column), low = load256(x.low + column);
      const __m256i high_odd = _mm256_and_si256(high, _mm256_set1_epi16(static_cast<int16_t>(0xFF00)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(of_even), _mm256_add_epi16(_mm256_slli_epi16(high, 8), even(low)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(of_odd), _mm256_add_epi16(high_odd, odd(low)));
      __m256i all[n];
      for (size_t h = 0; h < n; ++h) all[h] = _mm256_setzero_si256();
      unrolled<F::raws>([&]<int i>() {
        __m256i v[n][4];
        for (size_t h = 0; h < n; ++h) rows[h].load(F::at(g, i), v[h]);
        unrolled<F::parts>([&]<int part>() {
#pragma GCC unroll 4
          for (size_t q = 0; q < 4; ++q) {
            constexpr size_t first = 4 * (i + part);
            const __m256i x_even = _mm256_set1_epi32(of_even[first + q]), x_odd = _mm256_set1_epi32(of_odd[first + q]);
#pragma GCC unroll 2
            for (size_t h = 0; h < n; ++h) {
              const __m256i w = F::template bytes_of<part>(v[h][q]);
              const __m256i both =
                  _mm256_add_epi32(_mm256_madd_epi16(even(w), x_even), _mm256_madd_epi16(odd(w), x_odd));
              all[h] = now(_mm256_add_epi32(all[h], both));
            }
          }
        });
      });
      const __m256 d = _mm256_set1_ps(x.d[column / 32]);
      for (size_t h = 0; h < n; ++h)
        sums[h].sum = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(all[h]), d), scales[h].template scale<g>(),
                                      sums[h].sum);
    });
  });
}

// One block of n times 8 rows of any other format.
template <class F, bool one, class Rows, size_t n, class Ask>
FALLOW_INLINE void dot_block_split(const Rows (&rows)[n], const Ask& ask, const Activation& x, size_t column,
                                   LaneSums (&sums)[n]) {
  constexpr int run = F::apart == 32 ? 2 : 1;  // pieces of the same groups
  const auto with_scales = [&]<size_t... h>(std::index_sequence<h...>, const auto& some) {
    const typename F::Scales scales[n] = {typename F::Scales(rows[h])...};
    some(scales);
  };
  with_scales(std::make_index_sequence<n>(), [&](const typename F::Scales (&scales)[n]) __attribute__((always_inline)) {
    __m256i tops[n][F::top_pieces * 4 + 1];
    for (size_t h = 0; h < n; ++h) F::tops(rows[h], tops[h]);
    unrolled<F::pieces / run>([&]<int p>() {
      LaneGroup<F::most, one> low[n], high[n];
      unrolled<run>([&]<int r>() {
        constexpr int i = p * run + r;
        ask(F::block > 32 ? i : column / 32 % 8);
        __m256i v[n][4];
        for (size_t h = 0; h < n; ++h) rows[h].load(F::at(i), v[h]);
        const size_t at = column + F::low(i);
#pragma GCC unroll 4
        for (size_t q = 0; q < 4; ++q) {
          const FourDigits<one> of_low(x, at + 4 * q), of_high(x, at + F::apart + 4 * q);
#pragma GCC unroll 2
          for (size_t h = 0; h < n; ++h) {
            __m256i a, b;
            F::template split<i, 4>(tops[h], q, v[h][q], a, b);
            low[h].add(4 * r + q, a, of_low);
            high[h].add(4 * r + q, b, of_high);
          }
        }
      });
      const auto finish = [&]<size_t from>(LaneGroup<F::most, one> (&groups)[n]) {
        const __m256 d = _mm256_set1_ps(x.d[(column + from) / 32]);
        for (size_t h = 0; h < n; ++h) {
          const __m256 scale = scales[h].template scale<from / F::group>();
          sums[h].sum = _mm256_fmadd_ps(_mm256_mul_ps(groups[h].sum(4 * run), d), scale, sums[h].sum);
        }
      };
      const auto subtract = [&]<size_t from>() {
        const __m256 of_x = _mm256_set1_ps(x.sum[(column + from) / F::group]);
        for (size_t h = 0; h < n; ++h)
          sums[h].minima = _mm256_fmadd_ps(scales[h].template minimum<from / F::group>(), of_x, sums[h].minima);
      };
      constexpr size_t from = F::low(p * run);
      finish.template operator()<from>(low);
      finish.template operator()<from + F::apart>(high);
      subtract.template operator()<from>();
      if constexpr (F::block > 32) subtract.template operator()<from + F::apart>();
    });
  });
}

// One block of n times 8 rows. Part i of 8 of what comes later is asked for by ask(i).
template <class F, bool one, class Rows, size_t n, class Ask>
FALLOW_INLINE void dot_block(const Rows (&rows)[n], const Ask& ask, const Activation& x, size_t column,
                             LaneSums (&sums)[n]) {
  if constexpr (kIsSigned<F>) {
    dot_block_signed<F>(rows, ask, x, column, sums);
  } else {
    dot_block_split<F, one>(rows, ask, x, column, sums);
  }
}

// Q6_K is multiplied half a block at a time: unrolled further, its products leave the cache of decoded
// instructions (Zen 3, from the second cache: 13 GB/s, and 20 so). `Half` has pieces(s), dwords of
// four columns each for tops, what belongs to these and 64 further, and what does to 32 and 96 further, and
// scales(i), those of four groups.

struct HalfOfTile {
  const uint8_t *columns, *four_scales;  // of these 8 rows
  bool asks;                             // for what comes kAhead later, of all rows of the tile

  struct Pieces {
    const uint8_t* at;
    bool asks;

    FALLOW_INLINE __m256i tops(size_t q) const {
      if (asks)
        for (size_t line = 0; line < 3; ++line)
          __builtin_prefetch(at + Stream<Q6_K>::kAhead + kTileRows * 4 * (3 * q + line), 0, 2);
      return load256(at + kTileRows * 4 * 3 * q);
    }
    FALLOW_INLINE __m256i first(size_t q) const { return load256(at + kTileRows * 4 * (3 * q + 1)); }
    FALLOW_INLINE __m256i second(size_t q) const { return load256(at + kTileRows * 4 * (3 * q + 2)); }
  };
  FALLOW_INLINE Pieces pieces(size_t s) const { return {columns + kTileRows * 48 * s, asks}; }
  FALLOW_INLINE __m256i scales(size_t i) const { return load256(four_scales + kTileRows * 4 * i); }
};

struct HalfOfRows {
  InLanes rows;
  size_t half;
  const __m256i* four_scales;

  struct Pieces {
    __m256i t[4], a[4], b[4];

    FALLOW_INLINE __m256i tops(size_t q) const { return t[q]; }
    FALLOW_INLINE __m256i first(size_t q) const { return a[q]; }
    FALLOW_INLINE __m256i second(size_t q) const { return b[q]; }
  };
  FALLOW_INLINE Pieces pieces(size_t s) const {
    Pieces found;
    rows.load(128 + 32 * half + 16 * s, found.t);
    rows.load(64 * half + 16 * s, found.a);
    rows.load(64 * half + 32 + 16 * s, found.b);
    return found;
  }
  FALLOW_INLINE __m256i scales(size_t i) const { return four_scales[i]; }
};

// The products of 128 columns, from `column` on, without d. Scales are whole numbers: what 32 columns add up
// to is one too, which one float of x goes with.
template <bool one, class Half>
__attribute__((noinline)) void dot_half_6(const Half& half, const Activation& of_x, size_t column, LaneSums& to) {
  const Activation x = of_x;
  LaneSums sums = to;
  __m256i high[4], low[4];
  const __m256i four[2] = {half.scales(0), half.scales(1)};
  unrolled<2>([&]<int s>() {
    const size_t at = column + 16 * s;
    __m256i scale[4];
    unrolled<4>([&]<int j>() {
      constexpr int g = 2 * j + s;
      const __m256i whole = _mm256_srai_epi32(_mm256_slli_epi32(four[g / 4], 24 - 8 * (g % 4)), 24);
      const __m256 sum = _mm256_set1_ps(x.sum16[at / 16 + 2 * j]);
      sums.minima = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), sum, sums.minima);
      scale[j] = _mm256_packs_epi32(whole, whole);
      scale[j] = _mm256_unpacklo_epi16(scale[j], scale[j]);
    });
    const auto pieces = half.pieces(s);
    __m256i some_high[4], some_low[4];
    unrolled<4>([&]<int q>() {
      const __m256i tops = pieces.tops(q), a = pieces.first(q), b = pieces.second(q);
      const __m256i weights[4] = {with_bits<4>(low_nibbles(a), tops, 0x30), with_bits<2>(low_nibbles(b), tops, 0x30),
                                  with_bits<0>(high_nibbles(a), tops, 0x30),
                                  with_bits<-2>(high_nibbles(b), tops, 0x30)};
      unrolled<4>([&]<int j>() {
        const FourDigits<one> digits(x, at + 32 * j + 4 * q);
        const auto add = [&](__m256i of_x, __m256i& some, __m256i& all) __attribute__((always_inline)) {
          const __m256i product = _mm256_maddubs_epi16(weights[j], of_x);
          some = now(q % 2 ? _mm256_add_epi16(some, product) : product);  // 16 bits hold two
          if constexpr (q % 2 == 1) {
            const __m256i scaled = _mm256_madd_epi16(some, scale[j]);
            all = now(s == 0 && q == 1 ? scaled : _mm256_add_epi32(all, scaled));
          }
        };
        add(digits.high, some_high[j], high[j]);
        if constexpr (!one) add(digits.low, some_low[j], low[j]);
      });
    });
  });
  unrolled<4>([&]<int j>() {
    __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(high[j]), _mm256_set1_ps(256));
    if constexpr (!one) sum = _mm256_add_ps(sum, _mm256_cvtepi32_ps(low[j]));
    sums.sum = _mm256_fmadd_ps(sum, _mm256_set1_ps(x.d[column / 32 + j]), sums.sum);
  });
  to = sums;
}

FALLOW_INLINE void add_block_6(const LaneSums& block, __m256 d, LaneSums& sums) {
  sums.sum = _mm256_fmadd_ps(block.sum, d, sums.sum);
  sums.minima = _mm256_fmadd_ps(block.minima, d, sums.minima);
}

// y[0..15] = rows of a tile . x, whose blocks lie in pairs as engine/tiles.cpp orders them.
template <bool one>
void dot_tile_6(const uint8_t* tile, size_t k, const Activation& x, float* y) {
  LaneSums sums[2];
  for (size_t at = 0; at < k; at += 2 * Q6_K::block, tile += kTileRows * 2 * Q6_K::bytes)
    for (size_t b = 0; b < 2; ++b) {
      const uint8_t *scales = tile + kTileRows * (4 + 208 * b), *columns = scales + kTileRows * 16;
      LaneSums block[2];
      for (size_t half = 0; half < 2; ++half)
        for (size_t h = 0; h < 2; ++h)
          dot_half_6<one>(HalfOfTile{columns + kTileRows * 96 * half + 4 * kLanes * h,
                                     scales + kTileRows * 8 * half + 4 * kLanes * h, h == 0},
                          x, at + Q6_K::block * b + 128 * half, block[h]);
      for (size_t h = 0; h < 2; ++h) {
        const __m256i both = load256(tile + 4 * kLanes * h);
        add_block_6(block[h], low_halves(b == 0 ? both : _mm256_srli_epi32(both, 16)), sums[h]);
      }
    }
  for (size_t h = 0; h < 2; ++h) sums[h].store<Q6_K>(y + h * kLanes);
}

template <class F, bool one>
void gemv_digits(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                 size_t k, const Activation& x, float* y) {
  for (size_t i = 0; i < n; i += kLanes) {
    const uint8_t* row[kLanes];
    Later<F, kLanes> later;
    for (size_t r = 0; r < kLanes; ++r) {  // past the end the last one stands in
      row[r] = w + row_of(rows, begin, i + r < n ? i + r : n - 1) * row_bytes;
      later.rows[r] = i + r + kLanes < n ? w + row_of(rows, begin, i + r + kLanes) * row_bytes : nullptr;
    }
    LaneSums sums[1];
    const InLanes lanes[1] = {{row}};
    for (size_t at = 0; at < k; at += F::block) {
      const auto ask = [&](size_t part) __attribute__((always_inline)) { later.ask(part); };
      if constexpr (F::type == kQ6_K) {
        __m256i scales[4];
        lanes[0].load(192, scales);
        LaneSums block;
        for (size_t half = 0; half < 2; ++half) {
          for (size_t part = 0; part < 4; ++part) ask(4 * half + part);
          dot_half_6<one>(HalfOfRows{lanes[0], half, scales + 2 * half}, x, at + 128 * half, block);
        }
        add_block_6(block, lanes[0].half(208), sums[0]);
      } else {
        dot_block<F, one>(lanes, ask, x, at, sums);
      }
      for (auto& p : row) p += F::bytes;
    }
    float found[kLanes];
    sums[0].store<F>(found);
    for (size_t r = 0; r < kLanes && i + r < n; ++r) y[i + r] = found[r];
  }
}

template <class F>
void gemv_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const Activation& x, float* y) {
  (x.one_digit ? gemv_digits<F, true> : gemv_digits<F, false>)(w, row_bytes, rows, begin, n, k, x, y);
}

// y[0..15] = rows of a tile . x.
template <class F, bool one>
void dot_tile(const uint8_t* tile, size_t k, const Activation& x, float* y) {
  LaneSums sums[2];
  for_blocks_of_tile<F>(tile, k, [&]<bool odd>(const uint8_t* first, size_t at) __attribute__((always_inline)) {
    const InTile<odd> halves[2] = {{first}, {first + 4 * kLanes}};
    const Stream<F> stream{first};
    dot_block<F, one>(halves, [&](size_t part) __attribute__((always_inline)) { stream.ask(part); }, x, at, sums);
  });
  for (size_t h = 0; h < 2; ++h) sums[h].store<F>(y + h * kLanes);
}

template <class F>
void gemv_tiles(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                const Activation* x, size_t tokens, float* y, size_t stride) {
  static_assert(kTileRows == 2 * kLanes && F::bytes % 2 == 0);
  for (size_t i = 0; i < n; i += kTileRows)
    for (size_t t = 0; t < tokens; ++t) {
      const auto dot = [&](const auto& in_one, const auto& in_two) {
        (x[t].one_digit ? in_one : in_two)(w + (begin + i) * row_bytes, k, x[t], y + t * stride + i);
      };
      if constexpr (F::type == kQ6_K) dot(dot_tile_6<true>, dot_tile_6<false>);
      else dot(dot_tile<F, true>, dot_tile<F, false>);
    }
}

// For the largest magnitude in each of n pairs of registers: the factor that makes it `most`, and back.
// Of eight pairs they are found together, a division for all.
template <size_t n>
struct Units {
  alignas(32) float inverse[8 * ((n + 7) / 8)], scale[8 * ((n + 7) / 8)];

  FALLOW_INLINE Units(const __m256* a, const __m256* b, float most) {
    static_assert(n == 1 || n % 8 == 0);
    const auto either = [&](size_t i) {
      const __m256 sign = _mm256_set1_ps(-0.0f);
      return max_of(_mm256_andnot_ps(sign, a[i]), _mm256_andnot_ps(sign, b[i]));
    };
    for (size_t first = 0; first < n; first += 8) {
      __m256 largest;
      if constexpr (n == 1) {
        largest = largest_lane(either(0));
      } else {
        __m256 two[4], four[2];
        for (size_t i = 0; i < 4; ++i) {
          const __m256 even = either(first + 2 * i), odd = either(first + 2 * i + 1);
          two[i] = max_of(_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
        }
        for (size_t i = 0; i < 2; ++i) {
          const __m256d even = _mm256_castps_pd(two[2 * i]), odd = _mm256_castps_pd(two[2 * i + 1]);
          four[i] = max_of(_mm256_castpd_ps(_mm256_unpacklo_pd(even, odd)),
                           _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd)));
        }
        largest = max_of(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                         _mm256_permute2f128_ps(four[0], four[1], 0x31));
      }
      largest = max_of(largest, _mm256_set1_ps(1e-30f));  // zeros divide by it
      _mm256_store_ps(scale + first, _mm256_mul_ps(largest, _mm256_set1_ps(1 / most)));
      _mm256_store_ps(inverse + first, _mm256_div_ps(_mm256_set1_ps(most), largest));
    }
  }
};

// Products of rows 0..7 and 8..15, as integers.
struct Integers {
  __m256i a, b;

  FALLOW_INLINE Integers(__m256 x, __m256 y, float inverse)
      : a(_mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(inverse)))),
        b(_mm256_cvtps_epi32(_mm256_mul_ps(y, _mm256_set1_ps(inverse)))) {}
  // Those of rows 0..3, 8..11, 4..7 and 12..15.
  FALLOW_INLINE __m256i words() const { return _mm256_packs_epi32(a, b); }
  // In every lane what two rows add up to.
  FALLOW_INLINE __m256 sums() const { return _mm256_add_ps(_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)); }
};

// y (8,) += what whole numbers stand for.
FALLOW_INLINE void add_scaled(__m256i sum, __m256 scale, float* y) {
  _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(y)));
}

// kSummed rows' coefficients times their scales in one group, as int8 with one scale. The error is that
// of int8 activations, but relative to the largest of 16 products instead of 32, and half of it since weights
// count from the middle of their range: where a format has minima those take what that adds up to, otherwise
// sums begin with it.
template <class F>
class Rounded {
 public:
  FALLOW_INLINE Rounded() = default;
  FALLOW_INLINE Rounded(const Integers& q, float scale)
      : bytes_(_mm256_packs_epi16(q.words(), q.words())), scale_(_mm256_set1_ps(scale)) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(stored_), bytes_);
    if constexpr (!F::has_min) {
      // -centre times the sum of the eight bytes of each half: sad adds them up without signs.
      const __m256i sum = _mm256_sad_epu8(_mm256_xor_si256(bytes_, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
      const __m256i first = _mm256_shuffle_epi8(sum, _mm256_set1_epi16(0x0100));
      start_ = _mm256_mullo_epi16(_mm256_sub_epi16(_mm256_set1_epi16(8 * 128), first),
                                  _mm256_set1_epi16(static_cast<short>(F::centre)));
    }
  }
  // The coefficients of the rows of step s, those of a pair in every 16 bits.
  FALLOW_INLINE __m256i pair(size_t s) const {
    return _mm256_shuffle_epi8(bytes_, _mm256_set1_epi16(static_cast<short>(0x0100 + 0x0202 * s)));
  }
  // The same of rows 4 f..4 f + 3, in every 32 bits.
  FALLOW_INLINE __m256i four(size_t f) const { return four_of(stored_ + f / 2 * 4 + f % 2 * 16); }
  // What sums of 16 bits begin with; then they hold the sum of 8 rows, without it that of 8 of 5 bits.
  FALLOW_INLINE __m256i start() const { return F::has_min ? _mm256_setzero_si256() : start_; }
  // y (8,) += what the sums of a column's rows, in the two halves of v, stand for.
  FALLOW_INLINE void add_to(float* y, __m256i v) const {
    add_whole_to(y, _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v)),
                                     _mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1))));
  }
  FALLOW_INLINE void add_whole_to(float* y, __m256i sum) const { add_scaled(sum, scale_, y); }

 private:
  __m256i bytes_;  // of rows 0..3 and 8..11, 4..7 and 12..15, twice in each half
  alignas(32) int8_t stored_[32];  // the same, for loads that spread four of them: shuffles are scarcer
  __m256i start_;
  __m256 scale_;
};

// Coefficients of the groups of a block, and what kSummed rows add to its minima, 8 sums for each.
template <class F, class Rows>
FALLOW_INLINE void round_block(const Rows& low, const Rows& high, const float* c, Rounded<F>* rounded, float* minima) {
  typename F::Scales first(low), second(high);
  first.multiply(_mm256_loadu_ps(c));
  second.multiply(_mm256_loadu_ps(c + 8));
  constexpr size_t groups = F::block / F::group;
  __m256 a[groups], b[groups];
  unrolled<groups>([&]<int g>() {
    a[g] = first.template scale<g>();
    b[g] = second.template scale<g>();
  });
  const Units<groups> units(a, b, 127);
  unrolled<groups>([&]<int g>() {
    const Integers q(a[g], b[g], units.inverse[g]);
    rounded[g] = Rounded<F>(q, units.scale[g]);
    if constexpr (F::has_min) {  // w = s (q - centre) - (m - centre s), where only the first s is rounded
      __m256 m = _mm256_loadu_ps(minima + 8 * g);
      m = _mm256_add_ps(m, _mm256_add_ps(first.template minimum<g>(), second.template minimum<g>()));
      const __m256 error = _mm256_fmsub_ps(q.sums(), _mm256_set1_ps(units.scale[g]), _mm256_add_ps(a[g], b[g]));
      m = _mm256_fmadd_ps(error, _mm256_set1_ps(F::centre), m);
      _mm256_storeu_ps(minima + 8 * g, m);
    }
  });
}

// Steps of two pairs of rows that axpy_block takes.
FALLOW_INLINE InPairs step_of(const uint8_t* const* rows, size_t s) { return {rows + s / 2 * 8 + s % 2 * 2}; }

// What kSummed rows add to the columns of one piece, which join(s, q, v, low, high) makes weights of.
template <class F, class Join>
FALLOW_INLINE void axpy_piece(const uint8_t* const* rows, size_t at, const Rounded<F>& low, const Rounded<F>& high,
                              const Join& join, float* y) {
  __m256i sum[4] = {low.start(), low.start(), high.start(), high.start()};
#pragma GCC unroll 4
  for (size_t s = 0; s < 4; ++s) {
    __m256i v[2];
    step_of(rows, s).load(at, v);
    const __m256i of_low = low.pair(s), of_high = high.pair(s);
#pragma GCC unroll 2
    for (size_t q = 0; q < 2; ++q) {
      __m256i a, b;
      join(s, q, v[q], a, b);
      sum[q] = _mm256_add_epi16(sum[q], _mm256_maddubs_epi16(a, of_low));
      sum[2 + q] = _mm256_add_epi16(sum[2 + q], _mm256_maddubs_epi16(b, of_high));
    }
  }
  low.add_to(y, sum[0]);
  low.add_to(y + 8, sum[1]);
  high.add_to(y + F::apart, sum[2]);
  high.add_to(y + F::apart + 8, sum[3]);
}

// Pieces 2 p and 2 p + 1 of a block of 256 columns: a part at a time for the reason that Q6_K's products are.
template <class F>
__attribute__((noinline)) void axpy_part(const uint8_t* const* rows, const __m256i (&tops)[4][F::top_pieces * 2 + 1],
                                         size_t p, const Rounded<F>* rounded, float* y) {
  const __m128i shift = _mm_cvtsi64_si128(static_cast<int64_t>(F::shift(p)));
#pragma GCC unroll 2
  for (size_t r = 0; r < 2; ++r) {
    const size_t column = F::column(p, r);
    const auto join = [&](size_t s, size_t q, __m256i v, __m256i& a, __m256i& b) __attribute__((always_inline)) {
      F::join(F::top_pieces ? _mm256_srl_epi32(tops[s][2 * F::top(p, r) + q], shift) : v, v, a, b);
    };
    axpy_piece<F>(rows, F::at(0) + 32 * p + 16 * r, rounded[column / F::group],
                  rounded[(column + F::apart) / F::group], join, y + column);
  }
}

// y (block,) += one block of kSummed rows.
template <class F>
FALLOW_INLINE void axpy_block(const uint8_t* const* rows, Later<F, kSummed>& later, const float* c,
                              size_t column, float* y, float* minima) {
  Rounded<F> rounded[F::block / F::group];
  round_block<F>(InLanes{rows}, InLanes{rows + 8}, c, rounded, minima);
  __m256i tops[4][F::top_pieces * 2 + 1];
  for (size_t s = 0; s < 4; ++s) F::tops(step_of(rows, s), tops[s]);
  if constexpr (F::block == 256) {
    for (size_t p = 0; p < 4; ++p) {
      later.ask(2 * p);
      later.ask(2 * p + 1);
      axpy_part<F>(rows, tops, p, rounded, y);
    }
  } else {
    later.ask(column / 32 % 8);
    const auto join = [&](size_t s, size_t q, __m256i v, __m256i& a, __m256i& b) __attribute__((always_inline)) {
      F::template split<0, 2>(tops[s], q, v, a, b);
    };
    axpy_piece<F>(rows, F::at(0), rounded[0], rounded[0], join, y);
  }
}

// The same of a tile of bytes: products of two rows each, of which 16 bits hold four.
template <class F>
__attribute__((noinline)) void axpy_tile_part(const uint8_t* tile, size_t p, const Rounded<F>& low,
                                              const Rounded<F>& high, float* y) {
  const __m128i shift = _mm_cvtsi64_si128(static_cast<int64_t>(F::shift(p)));
#pragma GCC unroll 2
  for (size_t r = 0; r < 2; ++r) {
    const uint8_t *piece = tile + kTileRows * (F::at(0) + 32 * p + 16 * r), *tops = tile + kTileRows * (16 + 16 * r);
    __m256i sums[2][2];
#pragma GCC unroll 4
    for (size_t f = 0; f < 4; ++f) {
      const __m256i of_low = low.four(f), of_high = high.four(f);
#pragma GCC unroll 2
      for (size_t h = 0; h < 2; ++h) {
        const size_t at = 64 * f + 32 * h;
        const __m256i v = load256(piece + at);
        __m256i a, b;
        F::join(F::top_pieces ? _mm256_srl_epi32(load256(tops + at), shift) : v, v, a, b);
        a = _mm256_maddubs_epi16(a, of_low);
        b = _mm256_maddubs_epi16(b, of_high);
        sums[0][h] = now(f == 0 ? a : _mm256_add_epi16(sums[0][h], a));
        sums[1][h] = now(f == 0 ? b : _mm256_add_epi16(sums[1][h], b));
      }
    }
    const auto add = [&](const Rounded<F>& group, const __m256i (&sum)[2], float* to) {
      for (size_t h = 0; h < 2; ++h)
        group.add_whole_to(to + 8 * h, _mm256_madd_epi16(sum[h], _mm256_set1_epi16(1)));
    };
    add(low, sums[0], y + 16 * r);
    add(high, sums[1], y + 16 * r + F::apart);
  }
}

template <class F>
FALLOW_INLINE void axpy_tile_block(const uint8_t* tile, const float* c, float* y, float* minima) {
  static_assert(F::block == 256 && F::group == 32);
  Rounded<F> rounded[F::block / F::group];
  round_block<F>(InByteTile{tile}, InByteTile{tile + 128}, c, rounded, minima);
  const Stream<F> stream{tile};
  for (size_t p = 0; p < 4; ++p) {
    stream.ask(2 * p);
    stream.ask(2 * p + 1);
    axpy_tile_part<F>(tile, p, rounded[2 * p], rounded[2 * p + 1], y + 64 * p);
  }
}

// Coefficients of kSummed rows of Q8_0, whose weights have no room for one in 16 bits: both have 16. Those of
// some blocks are rounded together, since of one block each step waits for the last.
struct Rounded8_0 {
  static constexpr size_t most = 8;
  alignas(32) int32_t pairs[most][8];
  float scale[most];

  // scales(g, a, b) gives those of block g in rows 0..7 and 8..15. Pair p is of two rows that follow one
  // another, of 0..3, 8..11, 4..7 and 12..15, or where they alternate of the first and the third of four, then
  // the others.
  template <class Scales>
  FALLOW_INLINE Rounded8_0(const float* c, size_t blocks, bool alternate, const Scales& scales) {
    __m256 a[most] = {}, b[most] = {};
    const __m256 first = _mm256_loadu_ps(c), second = _mm256_loadu_ps(c + 8);
    for (size_t g = 0; g < blocks; ++g) {
      scales(g, a[g], b[g]);
      a[g] = _mm256_mul_ps(a[g], first);
      b[g] = _mm256_mul_ps(b[g], second);
    }
    const Units<most> units(a, b, 32767);
    for (size_t g = 0; g < blocks; ++g) {
      scale[g] = units.scale[g];
      __m256i words = Integers(a[g], b[g], units.inverse[g]).words();
      if (alternate) words = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xD8), 0xD8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[g]), words);
    }
  }
};

// y (32 blocks,) += some blocks of kSummed rows of Q8_0.
FALLOW_INLINE void axpy_blocks_8_0(const uint8_t* const* rows, Later<Q8_0, kSummed>& later, const float* c, size_t blocks,
                                   float* y) {
  const Rounded8_0 rounded(c, blocks, false, [&](size_t g, __m256& a, __m256& b) __attribute__((always_inline)) {
    a = InLanes{rows}.half(g * Q8_0::bytes);
    b = InLanes{rows + 8}.half(g * Q8_0::bytes);
  });
  for (size_t g = 0; g < blocks; ++g, y += 32) {
    later.ask(g);
    const size_t at = g * Q8_0::bytes + 2;
    const __m256 scale = _mm256_set1_ps(rounded.scale[g]);
    __m256i sum[4];
    unrolled<8>([&]<int p>() {
      constexpr size_t kEven[] = {0, 2, 8, 10, 4, 6, 12, 14};
      const __m256i pair = _mm256_set1_epi32(rounded.pairs[g][p]);
      unrolled<2>([&]<int h>() {
        const __m256i even = _mm256_cvtepi8_epi16(load128(rows[kEven[p]] + at + 16 * h));
        const __m256i odd = _mm256_cvtepi8_epi16(load128(rows[kEven[p] + 1] + at + 16 * h));
        const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(even, odd), pair);
        const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(even, odd), pair);
        sum[2 * h] = now(p == 0 ? low : _mm256_add_epi32(sum[2 * h], low));
        sum[2 * h + 1] = now(p == 0 ? high : _mm256_add_epi32(sum[2 * h + 1], high));
      });
    });
    unrolled<2>([&]<int h>() {  // columns 0..3 and 8..11, 4..7 and 12..15
      add_scaled(_mm256_permute2x128_si256(sum[2 * h], sum[2 * h + 1], 0x20), scale, y + 16 * h);
      add_scaled(_mm256_permute2x128_si256(sum[2 * h], sum[2 * h + 1], 0x31), scale, y + 16 * h + 8);
    });
  }
}

// The same of a tile of bytes, of which every block begins with its 16 scales. Those of some blocks are read
// first: what comes is asked for before that (Zen 3, two threads, of plain reading: 0.87, 0.53 if 1 KB ahead).
FALLOW_INLINE void axpy_tile_blocks_8_0(const uint8_t* tile, const float* c, size_t blocks, float* y) {
  constexpr size_t kBytes = kTileRows * Q8_0::bytes;
  const Rounded8_0 rounded(c, blocks, true, [&](size_t g, __m256& a, __m256& b) __attribute__((always_inline)) {
    a = _mm256_cvtph_ps(load128(tile + g * kBytes));
    b = _mm256_cvtph_ps(load128(tile + g * kBytes + 16));
  });
  for (size_t g = 0; g < blocks; ++g, tile += kBytes, y += 32) {
    Stream<Q8_0>{tile, 2 * Rounded8_0::most * kBytes}.ask(0);
    const __m256 scale = _mm256_set1_ps(rounded.scale[g]);
    __m256i sum[4];
    unrolled<4>([&]<int f>() {
      constexpr int first = 4 * (f % 2) + f / 2 * 2;  // see Rounded8_0
      const __m256i of_even = _mm256_set1_epi32(rounded.pairs[g][first]);
      const __m256i of_odd = _mm256_set1_epi32(rounded.pairs[g][first + 1]);
      unrolled<4>([&]<int h>() {
        const __m256i v = load256(tile + 32 + 256 * (h / 2) + 64 * f + 32 * (h % 2));
        const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), of_even);
        const __m256i both = _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srai_epi16(v, 8), of_odd));
        sum[h] = now(f == 0 ? both : _mm256_add_epi32(sum[h], both));
      });
    });
    unrolled<4>([&]<int h>() { add_scaled(sum[h], scale, y + 8 * h); });
  }
}

// y (width,) -= minima, 8 sums for each.
template <class F>
void subtract_minima(const float* minima, size_t width, float* y) {
  for (size_t g = 0; g < width / F::group; ++g) {
    float sum = 0;
    for (size_t lane = 0; lane < 8; ++lane) sum += minima[8 * g + lane];
    for (size_t j = 0; j < F::group; ++j) y[g * F::group + j] -= sum;
  }
}

// In slabs of columns whose sums and minima stay in the first cache.
template <class F>
void axpy_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                size_t k, const float* coefficient, float* y) {
  if (n == 0) return;
  for (size_t first = 0; first < k; first += kSlab) {
    const uint8_t* slab = w + first / F::block * F::bytes;
    const size_t width = k - first < kSlab ? k - first : kSlab;
    alignas(32) float minima[F::has_min ? kSlab / F::group * 8 : 1] = {};
    const auto row_at = [&](size_t i) { return slab + row_of(rows, begin, i) * row_bytes; };
    for (size_t i = 0; i < n; i += kSummed) {
      const uint8_t* row[kSummed];
      Later<F, kSummed> later;
      float c[kSummed];
      for (size_t r = 0; r < kSummed; ++r) {  // rows past the end are the last one with coefficient 0
        row[r] = row_at(i + r < n ? i + r : n - 1);
        c[r] = i + r < n ? coefficient[i + r] : 0.0f;
        later.rows[r] = i + r + kSummed < n ? row_at(i + r + kSummed) : nullptr;
      }
      for (size_t at = 0, blocks; at < width; at += blocks * F::block) {
        if constexpr (F::type == kQ8_0) {
          blocks = width - at < Rounded8_0::most * F::block ? (width - at) / F::block : Rounded8_0::most;
          axpy_blocks_8_0(row, later, c, blocks, y + first + at);
        } else {
          blocks = 1;
          axpy_block<F>(row, later, c, at, y + first + at,
                        minima + (F::has_min ? at / F::group * 8 : 0));
        }
        for (auto& p : row) p += blocks * F::bytes;
      }
    }
    if constexpr (F::has_min) subtract_minima<F>(minima, width, y + first);
  }
}

// The same of tiles of bytes.
template <class F>
void axpy_tiles(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k, const float* coefficient,
                size_t from, size_t tokens, float* y, size_t stride) {
  static_assert(kTileRows == kSummed && (F::has_min || F::type == kQ8_0));
  constexpr size_t kTogether = F::type == kQ8_0 ? Rounded8_0::most * F::block : F::block;
  for (size_t t = 0; t < tokens; ++t, coefficient += from, y += stride)
    for (size_t first = 0; first < k; first += kSlab) {
      const size_t width = k - first < kSlab ? k - first : kSlab;
      alignas(32) float minima[F::has_min ? kSlab / F::group * 8 : 1] = {};
      for (size_t i = 0; i < n; i += kTileRows) {
        const uint8_t* tile = w + (begin + i) * row_bytes + kTileRows * (first / F::block * F::bytes);
        for (size_t at = 0; at < width; at += kTogether, tile += kTileRows * (kTogether / F::block * F::bytes)) {
          if constexpr (F::type == kQ8_0) {
            const size_t some = width - at < kTogether ? width - at : kTogether;
            axpy_tile_blocks_8_0(tile, coefficient + i, some / F::block, y + first + at);
          } else {
            axpy_tile_block<F>(tile, coefficient + i, y + first + at, minima + at / F::group * 8);
          }
        }
      }
      if constexpr (F::has_min) subtract_minima<F>(minima, width, y + first);
    }
}

}  // namespace
}  // namespace fallow
