// Sums of rows of Q4_K and Q5_K. 16 rows are summed in integers before they become floats: their bytes
// stand side by side, four of a column in a dword, and meet four coefficients, which are rounded to int8
// with one scale per 16 rows and group. The error is that of int8 activations, but relative to the
// largest of 16 products instead of 32. Coefficients are made in 16-bit integers, 32 at once: one by
// one as floats they took as long as the products.
#pragma once

#include <cstring>

#include "formats/formats.h"
#include "kernels/avx512.h"
#include "kernels/avx512_lanes.h"

namespace fallow {
namespace {

constexpr size_t kSummed = 16;
static_assert(kSummed == kTileRows);

// Bytes of four rows side by side: lane l of out[i] holds bytes 16 l + 4 i + (0..3), a dword each.
FALLOW_INLINE void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i* out) {
  const __m512i low_ab = _mm512_unpacklo_epi8(a, b), low_cd = _mm512_unpacklo_epi8(c, d);
  const __m512i high_ab = _mm512_unpackhi_epi8(a, b), high_cd = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(low_ab, low_cd);
  out[1] = _mm512_unpackhi_epi16(low_ab, low_cd);
  out[2] = _mm512_unpacklo_epi16(high_ab, high_cd);
  out[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
}

// What 16 rows' first 16 bytes of a block say. Dword j of head[f] is byte j of rows 4 f..4 f + 3.
struct KGroups {
  __m512 d, dmin;          // of each row
  __m512i s[4], m[4];      // int16 (8 groups, 4 rows)

  FALLOW_INLINE explicit KGroups(const __m512i (&head)[4]) {
    const __m512i mask = _mm512_set_epi64(0x0F0F0F0F0F0F0F0F, 0x0F0F0F0F0F0F0F0F, 0x3F3F3F3F3F3F3F3F,
                                          0x3F3F3F3F3F3F3F3F, 0x0F0F0F0F0F0F0F0F, 0x0F0F0F0F0F0F0F0F,
                                          0x3F3F3F3F3F3F3F3F, 0x3F3F3F3F3F3F3F3F);
    const __m512i top = _mm512_set_epi64(0x3030303030303030, 0x3030303030303030, 0, 0,
                                         0x3030303030303030, 0x3030303030303030, 0, 0);
    const __m512i shift = _mm512_set_epi64(0x400000004, 0x400000004, 0, 0, 0, 0, 0, 0);
    const __m128i halves_first = _mm_set_epi8(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    __m128i halves[4];
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      // Parts of 16 bytes: d and dmin, a, c, e; see k_groups.
      const __m512i aece = _mm512_shuffle_i32x4(head[f], head[f], 0xED);
      const __m512i low = _mm512_and_si512(_mm512_srlv_epi32(aece, shift), mask);
      const __m512i aacc = _mm512_srli_epi32(_mm512_shuffle_i32x4(head[f], head[f], 0xA5), 2);
      const __m512i all = _mm512_ternarylogic_epi32(low, aacc, top, 0xF8);  // low | (aacc & top)
      s[f] = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(all));
      m[f] = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(all, 1));
      halves[f] = _mm_shuffle_epi8(_mm512_castsi512_si128(head[f]), halves_first);
    }
    const auto floats = [](__m128i a, __m128i b) { return _mm512_cvtph_ps(_mm256_set_m128i(b, a)); };
    d = floats(_mm_unpacklo_epi64(halves[0], halves[1]), _mm_unpacklo_epi64(halves[2], halves[3]));
    dmin = floats(_mm_unpackhi_epi64(halves[0], halves[1]), _mm_unpackhi_epi64(halves[2], halves[3]));
  }
};

// Where a group's dword lies in a register that packs make of (8 groups, 4 rows) of two fours of rows.
constexpr int32_t k_place(int32_t group) { return group / 2 * 4 + group % 2; }

// The quantised coefficients of 16 rows in one block: of rows 4 f..4 f + 3 and group g the four bytes at
// bytes[f / 2][k_place(g) + 2 * (f % 2)].
struct KCoefficients {
  alignas(64) int32_t bytes[2][16];
  alignas(64) int32_t start[16];  // what the offsets of group g add up to, negative, at k_place(g)
  alignas(32) float scale[8];     // of the integers

  // minima (16,), two parts of each group, += what the rows' minima come to, without the products.
  template <int centre>
  FALLOW_INLINE void set(const KGroups& groups, __m512 c, float* minima) {
    const Rounded a(_mm512_mul_ps(c, groups.d)), b(_mm512_mul_ps(c, groups.dmin));
    __m512i product[4], largest = _mm512_setzero_si512();
    __m512i scales = _mm512_setzero_si512(), mins = scales;
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      scales = _mm512_dpwssd_epi32(scales, a.of(f), groups.s[f]);
      mins = _mm512_dpwssd_epi32(mins, b.of(f), groups.m[f]);
      product[f] = _mm512_mulhrs_epi16(a.of(f), _mm512_slli_epi16(groups.s[f], 8));  // a s / 128
      largest = _mm512_max_epi16(largest, _mm512_abs_epi16(product[f]));
    }
    largest = _mm512_max_epi16(largest, _mm512_rol_epi64(largest, 32));
    largest = _mm512_max_epi16(largest, _mm512_rol_epi64(largest, 16));
    // w = s (q - centre) - (m - centre s)
    __m512 sum = _mm512_loadu_ps(minima);
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(mins), _mm512_set1_ps(b.unit), sum);
    sum = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(scales), _mm512_set1_ps(centre * a.unit), sum);
    _mm512_storeu_ps(minima, sum);

    // The factor that makes the largest 127 at most, as a 16-bit fraction; the scale undoes it exactly.
    __m256 most = _mm512_cvtepi64_ps(_mm512_and_si512(largest, _mm512_set1_epi64(0xFFFF)));
    most = _mm256_max_ps(most, _mm256_set1_ps(1));
    __m256 factor = _mm256_floor_ps(_mm256_div_ps(_mm256_set1_ps(127.0f * 32768), most));
    factor = _mm256_min_ps(factor, _mm256_set1_ps(32767));
    _mm256_store_ps(scale, _mm256_div_ps(_mm256_set1_ps(a.unit * 128 * 32768), factor));
    const __m512i four_times =
        _mm512_broadcast_i32x4(_mm_set_epi8(9, 8, 9, 8, 9, 8, 9, 8, 1, 0, 1, 0, 1, 0, 1, 0));
    const __m512i factors =
        _mm512_shuffle_epi8(_mm512_cvtepi32_epi64(_mm256_cvttps_epi32(factor)), four_times);
    const auto two = [&](int f) {
      return _mm512_packs_epi16(_mm512_mulhrs_epi16(product[f], factors),
                                _mm512_mulhrs_epi16(product[f + 1], factors));
    };
    const __m512i first = two(0), second = two(2);
    _mm512_store_si512(bytes[0], first);
    _mm512_store_si512(bytes[1], second);
    const __m512i all = _mm512_set1_epi8(centre);
    __m512i sums = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), all, first), all, second);
    sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));
    _mm512_store_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
  }

 private:
  // 16 values as int16 of one unit.
  struct Rounded {
    float unit;
    alignas(32) int16_t values[16];

    FALLOW_INLINE explicit Rounded(__m512 v) {
      const float largest = largest_of(_mm512_abs_ps(v));
      unit = largest / 32767;
      const __m512 inverse = _mm512_set1_ps(largest > 0 ? 32767 / largest : 0.0f);
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
      _mm256_store_si256(reinterpret_cast<__m256i*>(values), _mm512_cvtepi32_epi16(rounded));
    }
    // Those of four rows, for every group.
    FALLOW_INLINE __m512i of(int f) const {
      int64_t four;
      std::memcpy(&four, values + 4 * f, sizeof four);
      return _mm512_set1_epi64(four);
    }
  };
};

// Where the bytes of fifth bits (Q5_K) and of nibbles begin.
template <class F>
struct KPlaces {
  static constexpr bool has_fifth = F::type == kQ5_K;
  static constexpr size_t fifth = 16, nibbles = has_fifth ? 48 : 16;
};

// to (16,) += sum of a column's integers, times their scale
FALLOW_INLINE void add_scaled(__m512i sum, __m512 scale, float* to) {
  _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(to)));
}

// 16 rows' next block, wherever they lie.
template <class F>
struct KRows {
  const uint8_t *b[kSummed], *later[kSummed];

  FALLOW_INLINE KRows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t i,
                      size_t n, size_t from) {
    const auto at = [&](size_t r) { return w + row_of(rows, begin, r) * row_bytes + from; };
    for (size_t r = 0; r < kSummed; ++r) {
      b[r] = at(i + r < n ? i + r : n - 1);
      later[r] = i + r + kSummed < n ? at(i + r + kSummed) : nullptr;
    }
  }
  FALLOW_INLINE void next() {
    for (auto& p : b) p += F::bytes;
  }
  FALLOW_INLINE KGroups groups() {
    __m512i head[4];
    const __m512i rows_first =
        _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes_first = _mm512_broadcast_i32x4(
        _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
    const auto load = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
#pragma GCC unroll 4
    for (size_t f = 0; f < 4; ++f) {
      const uint8_t* const* r = b + 4 * f;
      const __m512i v = side_by_side(load(r[0]), load(r[1]), load(r[2]), load(r[3]));
      head[f] = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(rows_first, v), bytes_first);
    }
    return KGroups(head);
  }

  // 64 bytes of nibbles hold four groups: 0 and 2 in their low halves, 1 and 3 in their high ones, and
  // 4 further on. sums (256,) are in the order of `place`.
  template <size_t tokens>
  FALLOW_INLINE void add(const KCoefficients* coefficients, float* sums, size_t stride) {
    __m512i fifth[4][4];
    if constexpr (KPlaces<F>::has_fifth)
#pragma GCC unroll 4
      for (size_t f = 0; f < 4; ++f) {
        const auto bits = [&](size_t r) {
          return _mm512_broadcast_i64x4(_mm256_loadu_si256(
              reinterpret_cast<const __m256i*>(b[4 * f + r] + KPlaces<F>::fifth)));
        };
        interleave(bits(0), bits(1), bits(2), bits(3), fifth[f]);
      }
    half<0, tokens>(fifth, coefficients, sums, stride);
    half<4, tokens>(fifth, coefficients, sums + 128, stride);
  }
  static size_t place(size_t j) {
    const size_t byte = j / 64 * 32 + j % 32;
    return 64 * (j / 32 % 2) + 128 * (j / 128) + 16 * (byte % 16 / 4) + 4 * (byte % 64 / 16) + byte % 4;
  }

 private:
  // Lanes of groups g and g + 2 of a register.
  template <int g>
  static FALLOW_INLINE __m512i spread(const int32_t* values, int32_t further = 0) {
    const __m256i first = _mm256_set1_epi32(k_place(g) + further), second = _mm256_set1_epi32(k_place(g + 2) + further);
    return _mm512_permutexvar_epi32(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1),
                                    _mm512_load_si512(values));
  }
  template <int g>
  static FALLOW_INLINE __m512 spread(const float* scale) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set1_ps(scale[g])), _mm256_set1_ps(scale[g + 2]), 1);
  }
  // Bits g and g + 2 of the fifth ones, in the lanes of these groups.
  template <int g>
  static FALLOW_INLINE __m512i add_fifth(__m512i low, __m512i bits) {
    constexpr int left = g < 4 ? 4 - g : 0, right = g < 4 ? 0 : g - 4;
    constexpr auto two = [](int64_t shift) { return shift << 32 | shift; };
    if constexpr (g < 4) {
      const __m512i shift = _mm512_set_epi64(two(left - 2), two(left - 2), two(left - 2), two(left - 2),
                                             two(left), two(left), two(left), two(left));
      return with_fifth(low, _mm512_sllv_epi32(bits, shift));
    } else {
      const __m512i shift = _mm512_set_epi64(two(right + 2), two(right + 2), two(right + 2), two(right + 2),
                                             two(right), two(right), two(right), two(right));
      return with_fifth(low, _mm512_srlv_epi32(bits, shift));
    }
  }

  // Later rows are asked for two at a time, see LaneRows::ask.
  template <int g, size_t tokens>
  FALLOW_INLINE void half(const __m512i (&fifth)[4][4], const KCoefficients* coefficients, float* sums,
                          size_t stride) {
    __m512i low[tokens][4], high[tokens][4];
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      const __m512i first = spread<g>(coefficients[t].start), second = spread<g + 1>(coefficients[t].start);
      for (size_t i = 0; i < 4; ++i) low[t][i] = first, high[t][i] = second;
    }
#pragma GCC unroll 4
    for (int f = 0; f < 4; ++f) {
      const uint8_t* const* r = b + 4 * f;
      const auto load = [&](int i) {
        return _mm512_loadu_si512(r[i] + KPlaces<F>::nibbles + 16 * g);
      };
      __m512i columns[4];
      interleave(load(0), load(1), load(2), load(3), columns);
      for (int row = 2 * (g + f); row < 2 * (g + f) + 2; ++row) prefetch(later[row], F::bytes);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        __m512i first = low_nibbles(columns[i]), second = high_nibbles(columns[i]);
        if constexpr (KPlaces<F>::has_fifth) {
          first = add_fifth<g>(first, fifth[f][i]);
          second = add_fifth<g + 1>(second, fifth[f][i]);
        }
#pragma GCC unroll 4
        for (size_t t = 0; t < tokens; ++t) {
          const int32_t* bytes = coefficients[t].bytes[f / 2];
          low[t][i] = _mm512_dpbusd_epi32(low[t][i], first, spread<g>(bytes, 2 * (f % 2)));
          high[t][i] = _mm512_dpbusd_epi32(high[t][i], second, spread<g + 1>(bytes, 2 * (f % 2)));
        }
      }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      const __m512 first = spread<g>(coefficients[t].scale), second = spread<g + 1>(coefficients[t].scale);
      float* to = sums + t * stride;
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i, to += 16) {
        add_scaled(low[t][i], first, to);
        add_scaled(high[t][i], second, to + 64);
      }
    }
  }
};

// The next block of a tile: piece p, 16 bytes, of rows 4 f..4 f + 3 is the register at 4 p + f, whose
// dword j is byte j of the piece of these rows.
template <class F>
struct KTile {
  const uint8_t* b;

  FALLOW_INLINE KTile(const uint8_t* w, size_t row_bytes, const int32_t*, size_t begin, size_t i, size_t,
                      size_t from)
      : b(w + (begin + i) * row_bytes + from * kSummed) {}
  FALLOW_INLINE void next() { b += kSummed * F::bytes; }
  FALLOW_INLINE __m512i piece(size_t at, size_t f) const {
    return _mm512_loadu_si512(b + at * kSummed + 64 * f);
  }
  FALLOW_INLINE KGroups groups() const {
    const __m512i head[4] = {piece(0, 0), piece(0, 1), piece(0, 2), piece(0, 3)};
    return KGroups(head);
  }
  template <size_t tokens>
  FALLOW_INLINE void add(const KCoefficients* coefficients, float* sums, size_t stride) const {
    __m512i fifth[2][4];
    if constexpr (KPlaces<F>::has_fifth)
      for (size_t h = 0; h < 2; ++h)
        for (size_t f = 0; f < 4; ++f) fifth[h][f] = piece(KPlaces<F>::fifth + 16 * h, f);
    const auto pair = [&]<int g>() {
      for (size_t h = 0; h < 2; ++h) columns<g, tokens>(h, fifth[h], coefficients, sums + 32 * g + 16 * h, stride);
    };
    pair.template operator()<0>();
    pair.template operator()<2>();
    pair.template operator()<4>();
    pair.template operator()<6>();
  }
  static size_t place(size_t j) { return j; }

 private:
  // 16 columns of group g and as many of the next.
  template <int g, size_t tokens>
  FALLOW_INLINE void columns(size_t h, const __m512i* fifth, const KCoefficients* coefficients, float* sums,
                             size_t stride) const {
    __m512i low[tokens], high[tokens];
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      low[t] = _mm512_set1_epi32(coefficients[t].start[k_place(g)]);
      high[t] = _mm512_set1_epi32(coefficients[t].start[k_place(g + 1)]);
    }
#pragma GCC unroll 4
    for (size_t f = 0; f < 4; ++f) {
      const __m512i v = piece(KPlaces<F>::nibbles + 16 * g + 16 * h, f);
      __m512i first = low_nibbles(v), second = high_nibbles(v);
      if constexpr (KPlaces<F>::has_fifth) {
        first = with_fifth_of<g>(first, fifth[f]);
        second = with_fifth_of<g + 1>(second, fifth[f]);
      }
#pragma GCC unroll 4
      for (size_t t = 0; t < tokens; ++t) {
        const int32_t* bytes = coefficients[t].bytes[f / 2] + 2 * (f % 2);
        low[t] = _mm512_dpbusd_epi32(low[t], first, _mm512_set1_epi32(bytes[k_place(g)]));
        high[t] = _mm512_dpbusd_epi32(high[t], second, _mm512_set1_epi32(bytes[k_place(g + 1)]));
      }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      add_scaled(low[t], _mm512_set1_ps(coefficients[t].scale[g]), sums + t * stride);
      add_scaled(high[t], _mm512_set1_ps(coefficients[t].scale[g + 1]), sums + t * stride + 32);
    }
  }
};

// y[t] (k,) += sum over n rows of c[t * from + i] * row i, in slabs of columns whose sums and minima stay
// in the first cache.
template <class F, template <class> class Source, size_t tokens>
FALLOW_INLINE void axpy_k(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                          size_t k, const float* c, size_t from, float* y, size_t stride) {
  for (size_t first = 0; first < k; first += kSlab) {
    const size_t width = k - first < kSlab ? k - first : kSlab;
    alignas(64) float sums[tokens][kSlab];
    alignas(64) float minima[tokens][kSlab / 16];
    for (size_t t = 0; t < tokens; ++t) {
      std::memset(sums[t], 0, width * sizeof(float));
      std::memset(minima[t], 0, width / 16 * sizeof(float));
    }
    for (size_t i = 0; i < n; i += kSummed) {
      Source<F> source(w, row_bytes, rows, begin, i, n, first / F::block * F::bytes);
      __m512 c_of[tokens];  // rows past the end have coefficient 0
      for (size_t t = 0; t < tokens; ++t) c_of[t] = _mm512_maskz_loadu_ps(first_lanes(n - i), c + t * from + i);
      for (size_t at = 0; at < width; at += F::block, source.next()) {
        const KGroups groups = source.groups();
        KCoefficients coefficients[tokens];
#pragma GCC unroll 4
        for (size_t t = 0; t < tokens; ++t)
          coefficients[t].template set<static_cast<int>(F::centre)>(groups, c_of[t], minima[t] + at / 16);
        source.template add<tokens>(coefficients, sums[0] + at, kSlab);
      }
    }
    for (size_t t = 0; t < tokens; ++t)
      for (size_t j = 0; j < width; ++j)
        y[t * stride + first + j] += sums[t][j - j % F::block + Source<F>::place(j % F::block)] -
                                     (minima[t][j / 32 * 2] + minima[t][j / 32 * 2 + 1]);
  }
}

template <class F>
void axpy_k_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n, size_t k,
                 const float* coefficient, float* y) {
  axpy_k<F, KRows, 1>(w, row_bytes, rows, begin, n, k, coefficient, 0, y, 0);
}

template <class F, template <class> class Source>
void axpy_k_tokens(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                   const float* coefficient, size_t from, size_t tokens, float* y, size_t stride) {
  in_groups(tokens, [&]<size_t count>(size_t t) {
    axpy_k<F, Source, count>(w, row_bytes, nullptr, begin, n, k, coefficient + t * from, from,
                             y + t * stride, stride);
  });
}

}  // namespace
}  // namespace fallow
