// Products of 8 rows at a time, a row per lane, as avx512_lanes.h has them for 16: 16 bytes of each of
// 8 rows become four registers whose lane r holds a dword of row r, four columns of all the rows are
// then byte products with four values of x, and sums never leave their lanes. The two digits of x are
// summed apart in 16 bits as long as those hold them, and meet in one sum of 32 bits.
#pragma once

#include <immintrin.h>

#include "formats/formats.h"
#include "kernels/shared.h"

namespace fallow {
namespace {

constexpr size_t kLanes = 8;

// out[i] = dword i of the 16 bytes at `at` of every row.
FALLOW_INLINE void transpose_rows(const uint8_t* const* rows, size_t at, __m256i* out) {
  const auto load = [&](size_t r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + at));
  };
  __m256i v[4];
#pragma GCC unroll 4
  for (size_t r = 0; r < 4; ++r)
    v[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(load(r)), load(r + 4), 1);
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  out[0] = _mm256_unpacklo_epi64(a, b);
  out[1] = _mm256_unpackhi_epi64(a, b);
  out[2] = _mm256_unpacklo_epi64(c, d);
  out[3] = _mm256_unpackhi_epi64(c, d);
}

// The dword at `at` of every row.
FALLOW_INLINE __m256i dwords_of(const uint8_t* const* rows, size_t at) {
  const auto word = [&](size_t r) { return static_cast<int>(load_u32(rows[r] + at)); };
  return _mm256_set_epi32(word(7), word(6), word(5), word(4), word(3), word(2), word(1), word(0));
}

// The half-precision numbers in the low halves of dwords, those in the high halves.
FALLOW_INLINE __m256 low_halves(__m256i v) {
  const __m256i low = _mm256_and_si256(v, _mm256_set1_epi32(0xFFFF));
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
FALLOW_INLINE __m256 high_halves(__m256i v) { return low_halves(_mm256_srli_epi32(v, 16)); }

// The half-precision number at `at` of every row.
FALLOW_INLINE __m256 halves_of(const uint8_t* const* rows, size_t at) {
  const auto half = [&](size_t r) { return static_cast<short>(load_u16(rows[r] + at)); };
  return _mm256_cvtph_ps(
      _mm_set_epi16(half(7), half(6), half(5), half(4), half(3), half(2), half(1), half(0)));
}

FALLOW_INLINE __m256i low_nibbles(__m256i v) {
  return _mm256_and_si256(v, _mm256_set1_epi8(15));
}
FALLOW_INLINE __m256i high_nibbles(__m256i v) { return low_nibbles(_mm256_srli_epi32(v, 4)); }

// Byte i of every dword in the bytes of `to`, zero in the others.
template <int i, uint32_t to>
FALLOW_INLINE __m256i byte_to(__m256i v) {
  const auto source = [](int byte) { return to >> (8 * byte) & 255 ? i : -128; };
  const auto dword = [&](int lane) {
    uint32_t all = 0;
    for (int b = 0; b < 4; ++b) all |= static_cast<uint32_t>((source(b) + 4 * lane) & 255) << (8 * b);
    return static_cast<int>(all);
  };
  return _mm256_shuffle_epi8(v, _mm256_set_epi32(dword(3), dword(2), dword(1), dword(0), dword(3),
                                                 dword(2), dword(1), dword(0)));
}

FALLOW_INLINE __m256i four_of(const int8_t* x) {
  int32_t v;
  __builtin_memcpy(&v, x, sizeof v);
  return _mm256_set1_epi32(v);
}

// What 8 rows make of x: sum - minima, the latter times the offset for formats without minima.
struct LaneSums {
  __m256 sum = _mm256_setzero_ps(), minima = _mm256_setzero_ps();
};

// The products of a group of columns with the digits of x; `most` of them fit 16 bits.
template <size_t most>
class LaneGroup {
 public:
  // The sum is that of 256 * high + low, times what both 16-bit halves of a dword of `factor` hold.
  FALLOW_INLINE LaneGroup(__m256i factor, __m256i factor_256) : low_(factor), high_(factor_256) {}

  // Product number i of four columns of all rows, from `column` on.
  FALLOW_INLINE void add(size_t i, __m256i weights, const Activation& x, size_t column) {
    const __m256i high = _mm256_maddubs_epi16(weights, four_of(x.high + column));
    const __m256i low = _mm256_maddubs_epi16(weights, four_of(x.low + column));
    high16_ = i % most == 0 ? high : _mm256_add_epi16(high16_, high);
    low16_ = i % most == 0 ? low : _mm256_add_epi16(low16_, low);
    if (i % most != most - 1) return;
    const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(high16_, high_), _mm256_madd_epi16(low16_, low_));
    all_ = i < most ? both : _mm256_add_epi32(all_, both);
  }
  FALLOW_INLINE __m256 sum() const { return _mm256_cvtepi32_ps(all_); }

 private:
  __m256i low_, high_, high16_, low16_, all_;
};

// The scales and minima of Q4_K and Q5_K: bytes of groups 0..3 and 4..7, and what they count in.
struct KScales {
  __m256i s[2], m[2];
  __m256 d, dmin;

  FALLOW_INLINE explicit KScales(const uint8_t* const* rows) {
    __m256i t[4];
    transpose_rows(rows, 0, t);
    const __m256i six = _mm256_set1_epi8(63), top = _mm256_set1_epi8(0x30);
    d = low_halves(t[0]);
    dmin = high_halves(t[0]);
    s[0] = _mm256_and_si256(t[1], six);
    m[0] = _mm256_and_si256(t[2], six);
    s[1] = _mm256_or_si256(low_nibbles(t[3]), _mm256_and_si256(_mm256_srli_epi32(t[1], 2), top));
    m[1] = _mm256_or_si256(high_nibbles(t[3]), _mm256_and_si256(_mm256_srli_epi32(t[2], 2), top));
  }
};

// Q4_K and Q5_K.
template <class F>
struct LanesOfK : F {
  static constexpr bool has_fifth = F::type == kQ5_K;

  static FALLOW_INLINE void add(const uint8_t* const* rows, const Activation& x, size_t column,
                                LaneSums& sums) {
    const KScales scales(rows);
    __m256i fifth[8];
    if constexpr (has_fifth) {
      transpose_rows(rows, 16, fifth);
      transpose_rows(rows, 32, fifth + 4);
    }
    __m256 sum = _mm256_setzero_ps(), minima = _mm256_setzero_ps();
    const auto pair = [&]<int p>() {
      constexpr int g = 2 * p;
      const auto group_of = [&]<int i>() {
        return LaneGroup<has_fifth ? 4 : 8>(byte_to<i % 4, 0x00FF00FF>(scales.s[i / 4]),
                                            byte_to<i % 4, 0xFF00FF00>(scales.s[i / 4]));
      };
      auto first = group_of.template operator()<g>(), second = group_of.template operator()<g + 1>();
      const size_t at = column + 64 * p;
#pragma GCC unroll 2
      for (size_t piece = 0; piece < 2; ++piece) {
        __m256i t[4];
        transpose_rows(rows, F::bytes - 128 + 32 * p + 16 * piece, t);
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) {
          __m256i low = low_nibbles(t[i]), high = high_nibbles(t[i]);
          if constexpr (has_fifth) {  // bits 2 p and 2 p + 1 of a byte
            const __m256i bits = fifth[4 * piece + i], sixteen = _mm256_set1_epi8(16);
            const __m256i a = p < 2 ? _mm256_slli_epi32(bits, 4 - 2 * p) : _mm256_srli_epi32(bits, 2 * p - 4);
            const __m256i b = p < 2 ? _mm256_slli_epi32(bits, 3 - 2 * p) : _mm256_srli_epi32(bits, 2 * p - 3);
            low = _mm256_or_si256(low, _mm256_and_si256(a, sixteen));
            high = _mm256_or_si256(high, _mm256_and_si256(b, sixteen));
          }
          const size_t c = 4 * piece + i;
          first.add(c, low, x, at + 4 * c);
          second.add(c, high, x, at + 32 + 4 * c);
        }
      }
      sum = _mm256_fmadd_ps(first.sum(), _mm256_set1_ps(x.d[at / 32]), sum);
      sum = _mm256_fmadd_ps(second.sum(), _mm256_set1_ps(x.d[at / 32 + 1]), sum);
      const auto subtract = [&]<int i>() {
        const __m256 m = _mm256_cvtepi32_ps(byte_to<i % 4, 0xFF>(scales.m[i / 4]));
        minima = _mm256_fmadd_ps(m, _mm256_set1_ps(x.sum[column / 32 + i]), minima);
      };
      subtract.template operator()<g>();
      subtract.template operator()<g + 1>();
    };
    pair.template operator()<0>();
    pair.template operator()<1>();
    pair.template operator()<2>();
    pair.template operator()<3>();
    sums.sum = _mm256_fmadd_ps(sum, scales.d, sums.sum);
    sums.minima = _mm256_fmadd_ps(minima, scales.dmin, sums.minima);
  }
};

FALLOW_INLINE __m256i ones16() { return _mm256_set1_epi16(1); }
FALLOW_INLINE __m256i many16() { return _mm256_set1_epi16(256); }

// Q4_0, Q4_1, Q5_0 and Q5_1.
template <class F>
struct LanesOf32 : F {
  static constexpr size_t halves = F::has_min ? 4 : 2;
  static constexpr bool has_fifth = F::bytes == halves + 20;

  static FALLOW_INLINE void add(const uint8_t* const* rows, const Activation& x, size_t column,
                                LaneSums& sums) {
    __m256i t[4], fifth;
    if constexpr (has_fifth) fifth = dwords_of(rows, halves);
    transpose_rows(rows, F::bytes - 16, t);
    LaneGroup<has_fifth ? 4 : 8> group(ones16(), many16());
    const auto quad = [&]<int c>() {  // columns [4 c, 4 c + 4)
      __m256i v = c < 4 ? low_nibbles(t[c % 4]) : high_nibbles(t[c % 4]);
      if constexpr (has_fifth) {
        constexpr uint32_t bits = c % 2 ? 0x80402010 : 0x08040201;
        const __m256i wanted = _mm256_set1_epi32(static_cast<int>(bits));
        const __m256i found = _mm256_and_si256(byte_to<c / 2, 0xFFFFFFFF>(fifth), wanted);
        const __m256i set = _mm256_cmpeq_epi8(found, wanted);
        v = _mm256_or_si256(v, _mm256_and_si256(set, _mm256_set1_epi8(16)));
      }
      group.add(c, v, x, column + 4 * c);
    };
    quad.template operator()<0>();
    quad.template operator()<1>();
    quad.template operator()<2>();
    quad.template operator()<3>();
    quad.template operator()<4>();
    quad.template operator()<5>();
    quad.template operator()<6>();
    quad.template operator()<7>();
    __m256 s, m;
    if constexpr (F::has_min) {
      const __m256i both = dwords_of(rows, 0);
      s = low_halves(both);
      m = _mm256_xor_ps(high_halves(both), _mm256_set1_ps(-0.0f));
    } else {
      s = m = halves_of(rows, 0);
    }
    const __m256 d = _mm256_mul_ps(s, _mm256_set1_ps(x.d[column / 32]));
    sums.sum = _mm256_fmadd_ps(group.sum(), d, sums.sum);
    sums.minima = _mm256_fmadd_ps(m, _mm256_set1_ps(x.sum[column / 32]), sums.minima);
  }
};

struct LanesOf6_K : Q6_K {
  static FALLOW_INLINE void add(const uint8_t* const* rows, const Activation& x, size_t column,
                                LaneSums& sums) {
    __m256i scales[4];
    transpose_rows(rows, 192, scales);
    __m256 sum = _mm256_setzero_ps(), minima = _mm256_setzero_ps();
    const __m256i two = _mm256_set1_epi8(0x30);
    // 16 columns of each of four groups: columns 128 half + 16 part + 32 (0..3).
    const auto quarter = [&]<int half, int part>() {
      __m256i a[4], b[4], top[4];
      transpose_rows(rows, 64 * half + 16 * part, a);
      transpose_rows(rows, 64 * half + 16 * part + 32, b);
      transpose_rows(rows, 128 + 32 * half + 16 * part, top);
      const auto group = [&]<int g>() {
        LaneGroup<2> all(ones16(), many16());
        const size_t at = column + 128 * half + 32 * g + 16 * part;
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) {
          const __m256i v = g % 2 ? b[i] : a[i];
          const __m256i shifted = g < 2 ? _mm256_slli_epi32(top[i], 4 - 2 * g)
                                        : _mm256_srli_epi32(top[i], 2 * g - 4);
          all.add(i, _mm256_or_si256(g < 2 ? low_nibbles(v) : high_nibbles(v), _mm256_and_si256(shifted, two)),
                  x, at + 4 * i);
        }
        constexpr int n = 8 * half + 2 * g + part;  // of the 16 groups
        const __m256i s = _mm256_srai_epi32(_mm256_slli_epi32(scales[n / 4], 24 - 8 * (n % 4)), 24);
        const __m256 scale = _mm256_cvtepi32_ps(s);
        sum = _mm256_fmadd_ps(_mm256_mul_ps(all.sum(), _mm256_set1_ps(x.d[at / 32])), scale, sum);
        minima = _mm256_fmadd_ps(scale, _mm256_set1_ps(x.sum16[at / 16]), minima);
      };
      group.template operator()<0>();
      group.template operator()<1>();
      group.template operator()<2>();
      group.template operator()<3>();
    };
    quarter.template operator()<0, 0>();
    quarter.template operator()<0, 1>();
    quarter.template operator()<1, 0>();
    quarter.template operator()<1, 1>();
    const __m256 d = halves_of(rows, 208);
    sums.sum = _mm256_fmadd_ps(sum, d, sums.sum);
    sums.minima = _mm256_fmadd_ps(minima, d, sums.minima);
  }
};

template <class F>
void gemv_lanes(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                size_t k, const Activation& x, float* y) {
  for (size_t i = 0; i < n; i += kLanes) {
    const uint8_t *row[kLanes], *later[kLanes];
    for (size_t r = 0; r < kLanes; ++r) {  // past the end the last one stands in
      row[r] = w + row_of(rows, begin, i + r < n ? i + r : n - 1) * row_bytes;
      later[r] = i + r + kLanes < n ? w + row_of(rows, begin, i + r + kLanes) * row_bytes : nullptr;
    }
    LaneSums sums;
    for (size_t at = 0; at < k; at += F::block) {
      for (auto& p : later) prefetch(p, F::bytes);
      F::add(row, x, at, sums);
      for (auto& p : row) p += F::bytes;
    }
    const __m256 factor = _mm256_set1_ps(F::has_min ? 1.0f : static_cast<float>(F::offset));
    float found[kLanes];
    _mm256_storeu_ps(found, _mm256_fnmadd_ps(sums.minima, factor, sums.sum));
    for (size_t r = 0; r < kLanes && i + r < n; ++r) y[i + r] = found[r];
  }
}

}  // namespace
}  // namespace fallow
