// Products of 16 rows at a time, a row per lane. 16 bytes of each of 16 rows become four registers
// whose lane r holds a dword of row r; four columns of all the rows are then one byte product with
// four values of x, sums never leave their lanes, and a scale is a lane, not a permutation. Whole
// products of Q4_K so took 3.7 cycles per 64 weights in the first cache, row by row 5.4 (Zen 4); their
// memory streams have 16 rows in flight.
#pragma once

#include "formats/formats.h"
#include "kernels/avx512.h"

namespace fallow {
namespace {

constexpr size_t kLanes = 16;
static_assert(kLanes == kTileRows);

// t[4 p + i] = dword i of piece p, 16 bytes, of every row; of the last piece those that are in `bytes`.
FALLOW_INLINE void transpose_rows(const uint8_t* const* rows, size_t at, size_t bytes, __m512i* t) {
  const auto piece = [&](auto load) {
    __m512i v[4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) {
      v[r] = side_by_side(load(rows[r]), load(rows[r + 4]), load(rows[r + 8]), load(rows[r + 12]));
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
    const __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    t[0] = _mm512_unpacklo_epi64(a, b);
    t[1] = _mm512_unpackhi_epi64(a, b);
    t[2] = _mm512_unpacklo_epi64(c, d);
    t[3] = _mm512_unpackhi_epi64(c, d);
  };
  size_t p = 0;
#pragma GCC unroll 4
  for (; p + 16 <= bytes; p += 16, t += 4)
    piece([&](const uint8_t* b) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + at + p)); });
  if (p == bytes) return;
  const auto there = static_cast<__mmask16>((1u << (bytes - p)) - 1);
  piece([&](const uint8_t* b) { return _mm_maskz_loadu_epi8(there, b + at + p); });
}

// The dword at a byte of some dwords; the half-precision number there, as float.
template <size_t byte>
FALLOW_INLINE __m512i dword_at(const __m512i_u* t) {
  static_assert(byte % 2 == 0);
  if constexpr (byte % 4 == 0) return t[byte / 4];
  return _mm512_or_si512(_mm512_srli_epi32(t[byte / 4], 16), _mm512_slli_epi32(t[byte / 4 + 1], 16));
}
template <size_t byte>
FALLOW_INLINE __m512 half_at(const __m512i_u* t) {
  static_assert(byte % 2 == 0);
  const __m512i v = byte % 4 == 0 ? t[byte / 4] : _mm512_srli_epi32(t[byte / 4], 16);
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}

FALLOW_INLINE __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
FALLOW_INLINE __m512i high_nibbles(__m512i v) { return low_nibbles(_mm512_srli_epi32(v, 4)); }

// `low` in bits 0..3 and bit 4 of `fifth`, per byte.
FALLOW_INLINE __m512i with_fifth(__m512i low, __m512i fifth) {
  return _mm512_ternarylogic_epi32(low, fifth, _mm512_set1_epi8(16), 0xF8);  // low | (fifth & 16)
}

// The same with bit g of `bits`, that of group g in Q5_K.
template <int g>
FALLOW_INLINE __m512i with_fifth_of(__m512i low, __m512i bits) {
  return with_fifth(low, g < 4 ? _mm512_slli_epi32(bits, 4 - g) : _mm512_srli_epi32(bits, g - 4));
}

template <int i>
FALLOW_INLINE __m512 byte_as_float(__m512i v) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 8 * i), _mm512_set1_epi32(255)));
}

FALLOW_INLINE __m512i four_of(const int8_t* x) {
  int32_t v;
  __builtin_memcpy(&v, x, sizeof v);
  return _mm512_set1_epi32(v);
}

// Bits 0..3 of byte `byte` of each dword, or bits 4..7 if `high`, as bit 4 of its bytes, put to `low`.
template <int byte, bool high>
FALLOW_INLINE __m512i with_fifth_bits(__m512i low, __m512i bits) {
  const __m512i of_dword = _mm512_set_epi32(
      0x0C0C0C0C, 0x08080808, 0x04040404, 0, 0x0C0C0C0C, 0x08080808, 0x04040404, 0, 0x0C0C0C0C, 0x08080808,
      0x04040404, 0, 0x0C0C0C0C, 0x08080808, 0x04040404, 0);
  const __m512i there = _mm512_shuffle_epi8(bits, _mm512_add_epi8(of_dword, _mm512_set1_epi8(byte)));
  const __m512i own = _mm512_set1_epi32(static_cast<int>(high ? 0x80402010 : 0x08040201));
  return _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(there, own), low, _mm512_set1_epi8(16));
}

// What 16 rows make of some tokens: the products are sum - minima, the latter times the offset for
// formats without minima.
template <size_t tokens>
struct LaneSums {
  __m512 sum[tokens], minima[tokens];

  FALLOW_INLINE LaneSums() {
    for (size_t t = 0; t < tokens; ++t) sum[t] = minima[t] = _mm512_setzero_ps();
  }
  FALLOW_INLINE void subtract(__m512 m, const Activation* x, size_t group) {
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t)
      minima[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(x[t].sum[group]), minima[t]);
  }
  template <class F>
  FALLOW_INLINE void store(__mmask16 lanes, float* y, size_t stride) const {
    const __m512 factor = _mm512_set1_ps(F::has_min ? 1.0f : static_cast<float>(F::offset));
    for (size_t t = 0; t < tokens; ++t)
      _mm512_mask_storeu_ps(y + t * stride, lanes, _mm512_fnmadd_ps(minima[t], factor, sum[t]));
  }
};

// The integers of one group of columns, of both digits or the upper one.
template <size_t tokens, bool one>
struct LaneGroup {
  __m512i high[tokens], low[tokens];

  FALLOW_INLINE LaneGroup() {
    for (size_t t = 0; t < tokens; ++t) high[t] = low[t] = _mm512_setzero_si512();
  }
  // Four columns of all rows, from `column` on.
  FALLOW_INLINE void add(__m512i weights, const Activation* x, size_t column) {
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      high[t] = _mm512_dpbusd_epi32(high[t], weights, four_of(x[t].high + column));
      if constexpr (!one) low[t] = _mm512_dpbusd_epi32(low[t], weights, four_of(x[t].low + column));
    }
  }
  FALLOW_INLINE void finish(__m512 scale, const Activation* x, size_t column,
                            LaneSums<tokens>& sums) const {
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      __m512i all = _mm512_slli_epi32(high[t], 8);
      if constexpr (!one) all = _mm512_add_epi32(low[t], all);
      const __m512 d = _mm512_mul_ps(scale, _mm512_set1_ps(x[t].d[column / 32]));
      sums.sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), d, sums.sum[t]);
    }
  }
};

// Blocks of 32: quad<begin, c>(t) gives columns [4 c, 4 c + 4) of the block at byte `begin`.
template <class F>
struct LanesOf32 : F {
  static constexpr bool whole_bytes = F::centre == 128, has_fifth = F::centre == 16;
  static constexpr size_t head = F::has_min ? 4 : 2;

  template <size_t begin, int c>
  static FALLOW_INLINE __m512i quad(const __m512i_u* t) {
    if constexpr (whole_bytes) {
      return _mm512_xor_si512(dword_at<begin + head + 4 * c>(t), _mm512_set1_epi8(-128));
    } else {  // of 16 bytes the low nibbles are columns 0..15
      const __m512i v = dword_at<begin + F::bytes - 16 + 4 * (c % 4)>(t);
      const __m512i nibbles = c < 4 ? low_nibbles(v) : high_nibbles(v);
      if constexpr (!has_fifth) return nibbles;
      return with_fifth_bits<c / 2, c % 2>(nibbles, dword_at<begin + head>(t));
    }
  }
  template <size_t begin>
  static FALLOW_INLINE __m512 scale(const __m512i_u* t) { return half_at<begin>(t); }
  template <size_t begin>
  static FALLOW_INLINE __m512 minimum(const __m512i_u* t) {
    return _mm512_xor_ps(half_at<begin + 2>(t), _mm512_set1_ps(-0.0f));
  }

  template <size_t begin, bool one, size_t tokens>
  static FALLOW_INLINE void add_block(const __m512i_u* t, const Activation* x, size_t column,
                                      LaneSums<tokens>& sums) {
    LaneGroup<tokens, one> first, second;  // two, so that products wait half as long for each other
    const auto quads = [&]<int c>() {
      first.add(quad<begin, c>(t), x, column + 4 * c);
      second.add(quad<begin, c + 4>(t), x, column + 16 + 4 * c);
    };
    quads.template operator()<0>();
    quads.template operator()<1>();
    quads.template operator()<2>();
    quads.template operator()<3>();
#pragma GCC unroll 4
    for (size_t i = 0; i < tokens; ++i) {
      first.high[i] = _mm512_add_epi32(first.high[i], second.high[i]);
      if constexpr (!one) first.low[i] = _mm512_add_epi32(first.low[i], second.low[i]);
    }
    const __m512 s = scale<begin>(t);
    first.finish(s, x, column, sums);
    if constexpr (F::has_min) {
      sums.subtract(minimum<begin>(t), x, column / 32);
    } else {
      sums.subtract(s, x, column / 32);
    }
  }

  // `blocks` of a span; of two the second begins at another byte of a dword.
  template <bool one, size_t tokens, class Ask>
  static FALLOW_INLINE void add(const __m512i_u* t, const Activation* x, size_t column, size_t blocks,
                                LaneSums<tokens>& sums, const Ask& ask) {
    for (size_t b = 0; b < blocks; b += 2, t += F::bytes / 2) {
      add_block<0, one>(t, x, column + 32 * b, sums);
      ask(b / 2, (blocks + 1) / 2);
      if (b + 1 < blocks) add_block<F::bytes, one>(t, x, column + 32 * b + 32, sums);
    }
  }
};

// The scales and minima of Q4_K and Q5_K: bytes of groups 0..3 and 4..7, and what they count in.
struct KScales {
  __m512i s[2], m[2];
  __m512 d, dmin;

  FALLOW_INLINE explicit KScales(const __m512i_u* t) : d(half_at<0>(t)), dmin(half_at<2>(t)) {
    const __m512i six = _mm512_set1_epi8(63), top = _mm512_set1_epi8(0x30);
    s[0] = _mm512_and_si512(t[1], six);
    m[0] = _mm512_and_si512(t[2], six);
    s[1] = _mm512_or_si512(low_nibbles(t[3]), _mm512_and_si512(_mm512_srli_epi32(t[1], 2), top));
    m[1] = _mm512_or_si512(high_nibbles(t[3]), _mm512_and_si512(_mm512_srli_epi32(t[2], 2), top));
  }
  template <int g>
  FALLOW_INLINE __m512 scale() const { return _mm512_mul_ps(d, byte_as_float<g % 4>(s[g / 4])); }
  template <int g>
  FALLOW_INLINE __m512 minimum() const { return _mm512_mul_ps(dmin, byte_as_float<g % 4>(m[g / 4])); }
};

// Q4_K and Q5_K: F::quads(t, p, c, low, high) gives columns [64 p + 4 c, + 4) and those 32 on.
template <class F>
struct LanesOfK : F {
  template <bool one, size_t tokens, class Ask>
  static FALLOW_INLINE void add(const __m512i_u* t, const Activation* x, size_t column, size_t,
                                LaneSums<tokens>& sums, const Ask& ask) {
    const KScales scales(t);
    const auto pair = [&]<int p>() {
      LaneGroup<tokens, one> first, second;
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) {
        __m512i low, high;
        F::template quads<p>(t, c, low, high);
        const size_t at = column + 64 * p + 4 * static_cast<size_t>(c);
        first.add(low, x, at);
        second.add(high, x, at + 32);
        if (c % 2 == 0) ask(4 * p + c / 2, 16);
      }
      const size_t at = column + 64 * p;
      first.finish(scales.scale<2 * p>(), x, at, sums);
      second.finish(scales.scale<2 * p + 1>(), x, at + 32, sums);
      sums.subtract(scales.minimum<2 * p>(), x, at / 32);
      sums.subtract(scales.minimum<2 * p + 1>(), x, at / 32 + 1);
    };
    pair.template operator()<0>();
    pair.template operator()<1>();
    pair.template operator()<2>();
    pair.template operator()<3>();
  }
};
struct Block4_K : Q4_K {
  template <int p>
  static FALLOW_INLINE void quads(const __m512i_u* t, int c, __m512i& low, __m512i& high) {
    const __m512i v = t[4 + 8 * p + c];
    low = low_nibbles(v);
    high = high_nibbles(v);
  }
};
struct Block5_K : Q5_K {
  template <int p>
  static FALLOW_INLINE void quads(const __m512i_u* t, int c, __m512i& low, __m512i& high) {
    const __m512i v = t[12 + 8 * p + c], bits = t[4 + c];
    low = with_fifth_of<2 * p>(low_nibbles(v), bits);
    high = with_fifth_of<2 * p + 1>(high_nibbles(v), bits);
  }
};

// 16 rows, and those that come after them.
struct LaneRows {
  const uint8_t *row[kLanes], *later[kLanes];

  // Rows i.. of n; past the end the last one stands in.
  FALLOW_INLINE LaneRows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                         size_t i, size_t n) {
    for (size_t r = 0; r < kLanes; ++r) {
      row[r] = w + row_of(rows, begin, i + r < n ? i + r : n - 1) * row_bytes;
      later[r] = w + row_of(rows, begin, i + r + kLanes < n ? i + r + kLanes : n - 1) * row_bytes;
    }
  }
  // Asks for n bytes of the later rows. They go to the second cache: 16 rows and the next 16 do not
  // fit the first, which halved the speed of contiguous rows and cost a third of scattered ones'.
  // They are asked for in steps, between products: all at once they would be more than can be on their
  // way, and products would wait for them (half of the rows at random took 1.3 times as long; Zen 4).
  FALLOW_INLINE void ask(size_t step, size_t steps, size_t at, size_t n) const {
    for (size_t r = kLanes * step / steps; r < kLanes * (step + 1) / steps; ++r)
      for (size_t i = 0; i < n; i += 64) __builtin_prefetch(later[r] + at + i, 0, 1);
  }
};

// y[t * stride] = row . x[t] of 16 rows, of which `lanes` are wanted. Of both digits always: with one, asking
// for later rows took as long as the products saved, and more (1.08 times in the first cache; Zen 4).
template <class F, size_t tokens>
FALLOW_INLINE void dot_lanes(const LaneRows& rows, size_t k, const Activation* x, __mmask16 lanes,
                             float* y, size_t stride) {
  constexpr size_t blocks = kSpan / F::block, bytes = blocks * F::bytes;
  LaneSums<tokens> sums;
  __m512i t[(bytes + 15) / 16 * 4];
  size_t column = 0, at = 0;
  const auto span = [&](size_t some, size_t size) {
    // GCC 12 takes a function that does nothing but prefetch for one that does nothing.
    const auto ask = [&](size_t step, size_t steps) __attribute__((always_inline)) {
      rows.ask(step, steps, at, size);
    };
    transpose_rows(rows.row, at, size, t);
    F::template add<false>(t, x, column, some, sums, ask);
  };
  for (; column + kSpan <= k; column += kSpan, at += bytes) span(blocks, bytes);
  if constexpr (F::block == 32) {
    if (const size_t left = (k - column) / 32) span(left, left * F::bytes);
  }
  sums.template store<F>(lanes, y, stride);
}

// Whether all of some tokens have one digit.
template <size_t tokens>
FALLOW_INLINE bool one_digit(const Activation* x) {
  bool all = true;
  for (size_t t = 0; t < tokens; ++t) all = all && x[t].one_digit;
  return all;
}

// The same of a tile, which is what transpose_rows makes of 16 rows. It asks for nothing: one stream is
// what the processor sees coming, and hints cost a quarter of the speed (Zen 4, 2 threads: 40 GB/s of
// 40 that plain reads reach, 30 with hints, rows one by one 25).
template <class F, bool one, size_t tokens>
void dot_tile(const uint8_t* tile, size_t k, const Activation* x, float* y,
                            size_t stride) {
  LaneSums<tokens> sums;
  size_t column = 0;
  const auto span = [&](size_t columns) {
    // Fifth bits come first and are used to the end; touched in their turn they are part of the stream,
    // which was half as fast without (one thread, Zen 4).
    if constexpr (F::type == kQ5_K)
      for (size_t i = 4; i < 12; ++i) __builtin_prefetch(tile + 64 * i);
    F::template add<one>(reinterpret_cast<const __m512i_u*>(tile), x, column, columns / F::block, sums,
                            [](size_t, size_t) {});
    column += columns;
    tile += kLanes * columns / F::block * F::bytes;
  };
  while (column + kSpan <= k) span(kSpan);
  if constexpr (F::block == 32) {
    if (column < k) span(k - column);
  }
  sums.template store<F>(first_lanes(kLanes), y, stride);
}

template <class F>
void gemv_tiles(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                const Activation* x, size_t tokens, float* y, size_t stride) {
  for (size_t i = 0; i < n; i += kLanes)
    in_groups(tokens, [&]<size_t count>(size_t t) {
      const auto dot = one_digit<count>(x + t) ? dot_tile<F, true, count> : dot_tile<F, false, count>;
      dot(w + (begin + i) * row_bytes, k, x + t, y + t * stride + i, stride);
    });
}

template <class F>
void gemv_lanes(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                size_t k, const Activation& x, float* y) {
  for (size_t i = 0; i < n; i += kLanes)
    dot_lanes<F, 1>(LaneRows(w, row_bytes, rows, begin, i, n), k, &x, first_lanes(n - i), y + i, 0);
}

template <class F>
void gemv_lanes_tokens(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                       const Activation* x, size_t tokens, float* y, size_t stride) {
  for (size_t i = 0; i < n; i += kLanes) {
    const LaneRows rows(w, row_bytes, nullptr, begin, i, n);
    const __mmask16 lanes = first_lanes(n - i);
    in_groups(tokens, [&]<size_t count>(size_t t) {
      dot_lanes<F, count>(rows, k, x + t, lanes, y + t * stride + i, stride);
    });
  }
}

}  // namespace
}  // namespace fallow
