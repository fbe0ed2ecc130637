// AVX-512 with VNNI. Compiled with those flags and called only where the processor has them, so
// nothing here may be an inline function that other files share, apart from the formats' scalars.
#include "kernels/shared.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <cstring>
#include <type_traits>

#include "kernels/avx512.h"
#include "kernels/avx512_axpy_k.h"
#include "kernels/avx512_lanes.h"

namespace fallow {
namespace {

// Row by row weights are unpacked 64 at a time, in order, into one register; four such chunks are a span.

alignas(64) constexpr int32_t kLanes32[4][16] = {
    {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1},
    {2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3},
    {4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5},
    {6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7}};
alignas(64) constexpr int32_t kLanes16[4][16] = {
    {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3},
    {4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7},
    {8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10, 11, 11, 11, 11},
    {12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15}};

__m512i load512(const void* p) { return _mm512_loadu_si512(p); }
__m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
__m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Per-group values of one span: 8 floats for groups of 32, 16 for groups of 16.
template <size_t group>
struct Groups;

template <>
struct Groups<32> {
  using V = __m256;
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p, size_t n) {
    return n == 8 ? _mm256_loadu_ps(p)
                  : _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << n) - 1), p);
  }
  static void store(float* p, V v, size_t n) {
    _mm256_mask_storeu_ps(p, static_cast<__mmask8>((1u << n) - 1), v);
  }
  static V set1(float v) { return _mm256_set1_ps(v); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max_abs(V a, V b) {  // a >= 0; as integers, of which NaN's is the largest
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(0x7FFFFFFF));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), bits));
  }
  static V div(V a, V b) {  // 0 where b is 0
    return _mm256_maskz_div_ps(_mm256_cmp_ps_mask(b, zero(), _CMP_NEQ_OQ), a, b);
  }
  using I = __m256i;
  static I round(V v) { return _mm256_cvtps_epi32(v); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I minus_times(I a, int n) {
    return _mm256_mullo_epi32(a, _mm256_set1_epi32(-n));
  }
  // The low bytes of a, b, c, d side by side.
  static I bytes(I a, I b, I c, I d) {
    const I low = _mm256_set1_epi32(255);
    a = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_slli_epi32(_mm256_and_si256(b, low), 8));
    c = _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(c, low), 16), _mm256_slli_epi32(d, 24));
    return _mm256_or_si256(a, c);
  }
  static __m512 spread(V v, int chunk) {
    return _mm512_permutexvar_ps(load512(kLanes32[chunk]), _mm512_castps256_ps512(v));
  }
  static __m512i spread(I v, int chunk) {
    return _mm512_permutexvar_epi32(load512(kLanes32[chunk]), _mm512_castsi256_si512(v));
  }
};

template <>
struct Groups<16> {
  using V = __m512;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p, size_t n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
  static void store(float* p, V v, size_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  }
  static V set1(float v) { return _mm512_set1_ps(v); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max_abs(V a, V b) { return fallow::max_abs(a, b); }
  static V div(V a, V b) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(b, zero(), _CMP_NEQ_OQ), a, b);
  }
  using I = __m512i;
  static I round(V v) { return _mm512_cvtps_epi32(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I minus_times(I a, int n) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(-n)); }
  static I bytes(I a, I b, I c, I d) {
    const I low = _mm512_set1_epi32(255);
    a = _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi32(_mm512_and_si512(b, low), 8));
    c = _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(c, low), 16), _mm512_slli_epi32(d, 24));
    return _mm512_or_si512(a, c);
  }
  static __m512 spread(V v, int chunk) {
    return _mm512_permutexvar_ps(load512(kLanes16[chunk]), v);
  }
  static __m512i spread(I v, int chunk) {
    return _mm512_permutexvar_epi32(load512(kLanes16[chunk]), v);
  }
};

// The f16 at the start of each of n <= 8 blocks of some bytes, and the one after it; n is known where
// this is inlined.
template <size_t bytes>
FALLOW_INLINE void load_halves(const uint8_t* b, size_t n, __m256& first, __m256& second) {
  constexpr size_t words = bytes / 2;
  if constexpr (3 * words + 1 < 32) {  // those of four blocks lie in one register
    const auto four = [&](size_t i) {
      const size_t there = i < n ? (n - i) * words : 0;
      const auto mask = static_cast<__mmask32>(there < 32 ? (1ull << there) - 1 : ~0u);
      return _mm512_maskz_loadu_epi16(mask, b + i * bytes);
    };
    constexpr int64_t w = words, x = 32;
    const __m512i at = _mm512_set_epi64(
        0, 0, 0, 0, 0, 0, (x + 3 * w) << 48 | (x + 2 * w) << 32 | (x + w) << 16 | x,
        3 * w << 48 | 2 * w << 32 | w << 16);
    const __m512i low = four(0), high = four(4);
    const auto halves = [&](__m512i index) {
      return _mm256_cvtph_ps(
          _mm512_castsi512_si128(_mm512_permutex2var_epi16(low, index, high)));
    };
    first = halves(at);
    second = halves(_mm512_add_epi16(at, _mm512_set1_epi16(1)));
  } else {
    // Through memory, fewer than 8 would wait for their stores.
    const auto at = [&](size_t i) {
      return i < n ? static_cast<int>(load_u32(b + i * bytes)) : 0;
    };
    const __m256i pairs =
        _mm256_set_epi32(at(7), at(6), at(5), at(4), at(3), at(2), at(1), at(0));
    first = _mm256_cvtph_ps(_mm256_cvtepi32_epi16(pairs));
    second = _mm256_cvtph_ps(_mm256_cvtepi32_epi16(_mm256_srli_epi32(pairs, 16)));
  }
}

// 16 bytes of each of two blocks: nibbles of the first in the low half, of the second in the high.
FALLOW_INLINE __m512i two_nibble_blocks(const uint8_t* first, const uint8_t* second) {
  __m512i v = _mm512_broadcast_i32x4(load128(first));
  v = _mm512_mask_broadcast_i32x4(v, 0xFF00, load128(second));
  const __m512i shift = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
  return _mm512_and_si512(_mm512_srlv_epi64(v, shift), _mm512_set1_epi8(15));
}

// 32 bytes: low nibbles in the low half, high nibbles in the high half.
FALLOW_INLINE __m512i nibble_run(const uint8_t* p) {
  const __m512i v = _mm512_broadcast_i64x4(load256(p));
  const __m512i shift = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
  return _mm512_and_si512(_mm512_srlv_epi64(v, shift), _mm512_set1_epi8(15));
}

FALLOW_INLINE __m512i add_16_where(__m512i v, uint64_t bits) {
  return _mm512_mask_add_epi8(v, bits, v, _mm512_set1_epi8(16));
}

FALLOW_INLINE uint64_t two_words(const uint8_t* first, const uint8_t* second) {
  return load_u32(first) | static_cast<uint64_t>(load_u32(second)) << 32;
}

// Blocks of 32 that keep two columns in a byte: bytes of four blocks, `half` of a span, the low nibbles
// columns 0..15 of each. place(j) is where column j's sum lies when those of low nibbles come first.
template <class F, size_t from>
struct BlockNibbles {
  static FALLOW_INLINE __m512i load(const uint8_t* b, int half) {
    b += 4 * half * F::bytes + from;
    return side_by_side(load128(b), load128(b + F::bytes), load128(b + 2 * F::bytes),
                        load128(b + 3 * F::bytes));
  }
  static size_t place(size_t j) { return 64 * (j / 16 % 2) + 16 * (j % 16 / 4) + 4 * (j / 32) + j % 4; }
};

// chunk(b, j): columns [64 j, 64 j + 64) of a span; groups(b, n, s, m): its scales and minima, n groups
// of them; for formats without minima m is left alone.
struct V4_0 : Q4_0 {
  using Nibbles = BlockNibbles<Q4_0, 2>;
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) {
    b += 2 * j * bytes;
    return two_nibble_blocks(b + 2, b + bytes + 2);
  }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t n, __m256& s, __m256&) {
    __m256 unused;
    load_halves<bytes>(b, n, s, unused);
  }
};
struct V4_1 : Q4_1 {
  using Nibbles = BlockNibbles<Q4_1, 4>;
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) {
    b += 2 * j * bytes;
    return two_nibble_blocks(b + 4, b + bytes + 4);
  }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t n, __m256& s, __m256& m) {
    load_halves<bytes>(b, n, s, m);
    m = _mm256_xor_ps(m, _mm256_set1_ps(-0.0f));
  }
};
struct V5_0 : Q5_0 {
  static FALLOW_INLINE __m512i fifth_bits(__m512i q, const uint8_t* first, const uint8_t* second) {
    return add_16_where(q, two_words(first + 2, second + 2));
  }
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) {
    b += 2 * j * bytes;
    return fifth_bits(two_nibble_blocks(b + 6, b + bytes + 6), b, b + bytes);
  }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t n, __m256& s, __m256&) {
    __m256 unused;
    load_halves<bytes>(b, n, s, unused);
  }
};
struct V5_1 : Q5_1 {
  static FALLOW_INLINE __m512i fifth_bits(__m512i q, const uint8_t* first, const uint8_t* second) {
    return add_16_where(q, two_words(first + 4, second + 4));
  }
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) {
    b += 2 * j * bytes;
    return fifth_bits(two_nibble_blocks(b + 8, b + bytes + 8), b, b + bytes);
  }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t n, __m256& s, __m256& m) {
    load_halves<bytes>(b, n, s, m);
    m = _mm256_xor_ps(m, _mm256_set1_ps(-0.0f));
  }
};
struct V8_0 : Q8_0 {
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) {
    b += 2 * j * bytes;
    const __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(load256(b + 2)),
                                         load256(b + bytes + 2), 1);
    return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(128)));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t n, __m256& s, __m256&) {
    __m256 unused;
    load_halves<bytes>(b, n, s, unused);
  }
};

// d, dmin and the packed scales of Q4_K and Q5_K: four bytes each of a (scales 0..3), c (minima
// 0..3) and e (the low bits of the others, whose high bits are on top of a and c).
FALLOW_INLINE void k_groups(const uint8_t* b, __m256& s, __m256& m) {
  const __m128i v = load128(b);
  const __m128i aece =
      _mm_srlv_epi32(_mm_shuffle_epi32(v, _MM_SHUFFLE(3, 2, 3, 1)), _mm_set_epi32(4, 0, 0, 0));
  const __m128i low = _mm_and_si128(
      aece, _mm_set_epi32(0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F));
  const __m128i aacc = _mm_srli_epi32(_mm_shuffle_epi32(v, _MM_SHUFFLE(2, 2, 1, 1)), 2);
  const __m128i high = _mm_set_epi32(0x30303030, 0, 0x30303030, 0);
  const __m128i scales = _mm_ternarylogic_epi32(low, aacc, high, 0xF8);  // low | (aacc & high)
  const __m512 all = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(scales));
  const __m512i first_and_second = _mm512_set_epi64(0x100000001, 0x100000001, 0x100000001, 0x100000001, 0, 0, 0, 0);
  const __m512 halves = _mm512_permutexvar_ps(first_and_second, _mm512_castps256_ps512(_mm256_cvtph_ps(v)));
  const __m512 scaled = _mm512_mul_ps(all, halves);
  s = _mm512_castps512_ps256(scaled);
  m = _mm512_extractf32x8_ps(scaled, 1);
}

struct V4_K : Q4_K {
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) { return nibble_run(b + 16 + 32 * j); }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t, __m256& s, __m256& m) { k_groups(b, s, m); }
};
struct V5_K : Q5_K {
  static FALLOW_INLINE __m512i fifth_bits(__m512i q, const uint8_t* b, int j) {
    const __m512i high = _mm512_broadcast_i64x4(load256(b + 16));
    const __m512i bit = _mm512_inserti64x4(_mm512_set1_epi8(static_cast<char>(1 << (2 * j))),
                                           _mm256_set1_epi8(static_cast<char>(2 << (2 * j))), 1);
    return add_16_where(q, _mm512_test_epi8_mask(high, bit));
  }
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) {
    return fifth_bits(nibble_run(b + 48 + 32 * j), b, j);
  }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t, __m256& s, __m256& m) { k_groups(b, s, m); }
};
struct V6_K : Q6_K {
  static FALLOW_INLINE __m512i chunk(const uint8_t* b, int j) {
    __m512i low = load512(b + 64 * (j / 2));
    if (j % 2) low = _mm512_srli_epi16(low, 4);
    low = _mm512_and_si512(low, _mm512_set1_epi8(15));
    const __m512i top = _mm512_broadcast_i64x4(load256(b + 128 + 32 * (j / 2)));
    // Two bits at 0 and 2 (even chunks) or 4 and 6 (odd ones) go to bits 4 and 5.
    const __m512i shift = j % 2 ? _mm512_set_epi64(2, 2, 2, 2, 0, 0, 0, 0)
                                : _mm512_set_epi64(2, 2, 2, 2, 4, 4, 4, 4);
    const __m512i moved = j % 2 ? _mm512_srlv_epi64(top, shift) : _mm512_sllv_epi64(top, shift);
    return _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, size_t, __m512& s, __m512&) {
    const __m512 d = _mm512_set1_ps(_cvtsh_ss(load_u16(b + 208)));
    s = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(b + 192))), d);
  }
};

constexpr size_t kPrefetch = 8192;  // bytes ahead of the work, at least

// Rows of a matrix. A Row is where some row's next columns lie.
template <class F>
struct Whole {
  using Format = F;
  struct Row {
    const uint8_t* b = nullptr;

    FALLOW_INLINE __m512i chunk(int j) const { return F::chunk(b, j); }
    template <class V>
    FALLOW_INLINE void groups(size_t n, V& s, V& m) const {
      F::groups(b, n, s, m);
    }
    FALLOW_INLINE void skip(size_t columns) { b += columns / F::block * F::bytes; }
    FALLOW_INLINE void ask(size_t columns) {
      prefetch(b, columns / F::block * F::bytes);
    }
  };

  const uint8_t* data;
  size_t row_bytes;

  FALLOW_INLINE Row operator[](size_t row) const { return {data + row * row_bytes}; }
};

// y[t * stride] = row . x[t], of a Q6_K row; asks for the later row on the way. One sum per chunk: a
// single one would wait for its last addition four times per block, 16 of 19 cycles. Bytes need few
// steps row by row, and rows that follow each other are one memory stream: 16 at a time, or in tiles, they
// took 1.1 to 1.3 times as long (Zen 4).
template <size_t tokens>
FALLOW_INLINE void dot_row_q6_k(const uint8_t* row, const uint8_t* later, size_t k, const Activation* x,
                                float* y, size_t stride) {
  using G = Groups<16>;
  __m512 sums[tokens][4] = {}, offsets[tokens] = {};
  for (size_t at = 0; at < k; at += kSpan, row += Q6_K::bytes) {
    prefetch(later, Q6_K::bytes);
    __m512 s, unused, scale[tokens];
    V6_K::groups(row, 16, s, unused);
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      offsets[t] = _mm512_fmadd_ps(s, _mm512_loadu_ps(x[t].sum16 + at / 16), offsets[t]);
      const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
      scale[t] = _mm512_mul_ps(
          s, _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_loadu_ps(x[t].d + at / 32))));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i w = V6_K::chunk(row, j);
#pragma GCC unroll 4
      for (size_t t = 0; t < tokens; ++t) {
        const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, load512(x[t].high + at + 64 * j));
        const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), w, load512(x[t].low + at + 64 * j));
        sums[t][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), G::spread(scale[t], j), sums[t][j]);
      }
    }
  }
  for (size_t t = 0; t < tokens; ++t) {
    const __m512 all = _mm512_add_ps(_mm512_add_ps(sums[t][0], sums[t][1]), _mm512_add_ps(sums[t][2], sums[t][3]));
    y[t * stride] = _mm512_reduce_add_ps(all) - _mm512_reduce_add_ps(offsets[t]) * static_cast<float>(Q6_K::offset);
  }
}

// The row that is at work, and the one to ask for meanwhile.
struct RowAndLater {
  const uint8_t *row, *later;

  FALLOW_INLINE RowAndLater(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t i, size_t n)
      : row(w + row_of(rows, begin, i) * row_bytes), later(nullptr) {
    const size_t ahead = kPrefetch / row_bytes + 1;
    if (i + ahead < n) later = w + row_of(rows, begin, i + ahead) * row_bytes;
  }
};

void gemv_rows_q6_k(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                    size_t k, const Activation& x, float* y) {
  for (size_t i = 0; i < n; ++i) {
    const RowAndLater at(w, row_bytes, rows, begin, i, n);
    dot_row_q6_k<1>(at.row, at.later, k, &x, y + i, 1);
  }
}

void gemv_tokens_q6_k(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                      const Activation* x, size_t tokens, float* y, size_t stride) {
  for (size_t i = 0; i < n; ++i) {
    RowAndLater at(w, row_bytes, nullptr, begin, i, n);
    in_groups(tokens, [&]<size_t count>(size_t t) {
      dot_row_q6_k<count>(at.row, at.later, k, x + t, y + t * stride + i, stride);
      at.later = nullptr;  // it is asked for once
    });
  }
}

// The quantised coefficients of kSummed rows in one span.
template <class F>
struct Coefficients {
  using G = Groups<F::group>;
  typename G::I bytes[4];  // four int8 per group, one of each of four rows
  typename G::I start;     // what their offsets add up to, negative
  typename G::V scale;     // of the integers
};

// Scales and minima of kSummed rows in one span.
template <class F>
struct RowGroups {
  typename Groups<F::group>::V s[kSummed], m[kSummed];

  template <class Row>
  FALLOW_INLINE RowGroups(const Row* rows, size_t n) {
    for (size_t r = 0; r < kSummed; ++r) rows[r].groups(n, s[r], m[r]);
  }
};

// c[r] * s of kSummed rows as int8 with one scale per group. The error is that of int8 activations,
// but relative to the largest of 16 products instead of 32. Minima are summed exactly.
template <class F>
FALLOW_INLINE Coefficients<F> prepare(const RowGroups<F>& groups, const float* c, size_t n,
                                      float* minima) {
  using G = Groups<F::group>;
  constexpr int centre = F::has_min ? static_cast<int>(F::centre) : static_cast<int>(F::offset);
  typename G::V product[kSummed], largest = G::zero(), minimum = G::zero();
#pragma GCC unroll 16
  for (size_t r = 0; r < kSummed; ++r) {
    product[r] = G::mul(groups.s[r], G::set1(c[r]));
    largest = G::max_abs(largest, product[r]);
    if constexpr (F::has_min) {  // w = s (q - centre) - (m - centre s)
      minimum = G::fma(groups.m[r], G::set1(c[r]), minimum);
      minimum = G::fma(product[r], G::set1(-static_cast<float>(centre)), minimum);
    }
  }
  const typename G::V inverse = G::div(G::set1(127.0f), largest);
  Coefficients<F> found;
  typename G::I sum = G::round(G::zero());
#pragma GCC unroll 4
  for (size_t four = 0; four < 4; ++four) {
    typename G::I q[4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) q[r] = G::round(G::mul(product[4 * four + r], inverse));
    sum = G::add(sum, G::add(G::add(q[0], q[1]), G::add(q[2], q[3])));
    found.bytes[four] = G::bytes(q[0], q[1], q[2], q[3]);
  }
  if constexpr (F::has_min) {
    const typename G::V before = G::load(minima, n);
    G::store(minima, G::fma(minimum, G::set1(1.0f), before), n);
  }
  found.start = G::minus_times(sum, centre);
  found.scale = G::mul(largest, G::set1(1 / 127.0f));
  return found;
}

// sums[t] (chunks * 64,) += kSummed rows times token t's coefficients, for every token. Later rows are
// asked for in steps, see LaneRows::ask.
template <class F, int chunks, size_t tokens, class Row>
FALLOW_INLINE void axpy_chunks(const Row* rows, Row* later, const Coefficients<F> (&coefficients)[tokens],
                               float (*sums)[kSlab], size_t at) {
  using G = Groups<F::group>;
  for (int j = 0; j < chunks; ++j) {
    __m512i sum[tokens][4];
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      const __m512i start = G::spread(coefficients[t].start, j);
      for (__m512i& lane : sum[t]) lane = start;
    }
#pragma GCC unroll 4
    for (size_t four = 0; four < 4; ++four) {
      const Row* r = rows + 4 * four;
      __m512i columns[4];
      interleave(r[0].chunk(j), r[1].chunk(j), r[2].chunk(j), r[3].chunk(j), columns);
      const size_t step = 4 * static_cast<size_t>(j) + four;
      for (size_t i = 4 * step / chunks; i < 4 * (step + 1) / chunks; ++i) later[i].ask(64 * chunks);
#pragma GCC unroll 4
      for (size_t t = 0; t < tokens; ++t) {
        const __m512i bytes = G::spread(coefficients[t].bytes[four], j);
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) sum[t][i] = _mm512_dpbusd_epi32(sum[t][i], columns[i], bytes);
      }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      const __m512 scale = G::spread(coefficients[t].scale, j);
      float* to = sums[t] + at + 64 * static_cast<size_t>(j);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i, to += 16) add_scaled(sum[t][i], scale, to);
    }
  }
}

// The same for a span of formats that keep two columns in a byte: bytes are interleaved, and then halved.
template <class F, size_t tokens, class Row>
FALLOW_INLINE void axpy_nibbles(const Row* rows, Row* later, const Coefficients<F> (&coefficients)[tokens],
                                float (*sums)[kSlab], size_t at) {
  using N = typename F::Nibbles;
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, at += 128) {
    const __m512i groups = load512(kLanes16[half]);  // of the dwords, in both halves of their bytes
    const auto spread = [&](__m256i v) {
      return _mm512_permutexvar_epi32(groups, _mm512_castsi256_si512(v));
    };
    __m512i low[tokens][4], high[tokens][4];
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t)
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) low[t][i] = high[t][i] = spread(coefficients[t].start);
#pragma GCC unroll 4
    for (size_t four = 0; four < 4; ++four) {
      const Row* r = rows + 4 * four;
      __m512i columns[4];
      interleave(N::load(r[0].b, half), N::load(r[1].b, half), N::load(r[2].b, half),
                 N::load(r[3].b, half), columns);
      const size_t step = 4 * static_cast<size_t>(half) + four;
      for (size_t i = 2 * step; i < 2 * step + 2; ++i) later[i].ask(kSpan);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        const __m512i first = low_nibbles(columns[i]), second = high_nibbles(columns[i]);
#pragma GCC unroll 4
        for (size_t t = 0; t < tokens; ++t) {
          const __m512i bytes = spread(coefficients[t].bytes[four]);
          low[t][i] = _mm512_dpbusd_epi32(low[t][i], first, bytes);
          high[t][i] = _mm512_dpbusd_epi32(high[t][i], second, bytes);
        }
      }
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      const __m512 scale = _mm512_permutexvar_ps(groups, _mm512_castps256_ps512(coefficients[t].scale));
      float* to = sums[t] + at;
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i, to += 16) {
        add_scaled(low[t][i], scale, to);
        add_scaled(high[t][i], scale, to + 64);
      }
    }
  }
}

// What some tokens' coefficients, those of token t at c[t * stride], make of n rows.
struct Tokens {
  const float* c;
  size_t stride;
  float* y;
  size_t y_stride;
};

// Columns [from, from + k) of the rows' sums, a slab whose sums and minima stay in the first cache.
template <size_t tokens, class Rows>
FALLOW_INLINE void axpy_slab(const Rows& w, const int32_t* rows, size_t begin, size_t n,
                             size_t from, size_t k, const Tokens& x) {
  using F = typename Rows::Format;
  using Row = typename Rows::Row;
  alignas(64) float sums[tokens][kSlab];
  alignas(64) float minima[tokens][kSlab / F::group];
  for (size_t t = 0; t < tokens; ++t) {
    std::memset(sums[t], 0, k * sizeof(float));
    std::memset(minima[t], 0, k / F::group * sizeof(float));
  }
  const auto row_at = [&](size_t i) {
    auto row = w[row_of(rows, begin, i)];
    row.skip(from);
    return row;
  };
  const size_t whole = k / kSpan * kSpan;
  for (size_t i = 0; i < n; i += kSummed) {
    Row b[kSummed], later[kSummed];
    float c[tokens][kSummed];
    for (size_t r = 0; r < kSummed; ++r) {  // rows past the end are the last one with coefficient 0
      const bool there = i + r < n;
      b[r] = row_at(there ? i + r : n - 1);
      for (size_t t = 0; t < tokens; ++t) c[t][r] = there ? x.c[t * x.stride + i + r] : 0.0f;
      if (i + r + kSummed < n) later[r] = row_at(i + r + kSummed);
    }
    const auto span = [&](size_t at, auto columns, auto add) {
      const RowGroups<F> groups(b, columns / F::group);
      Coefficients<F> coefficients[tokens];
#pragma GCC unroll 4
      for (size_t t = 0; t < tokens; ++t)
        coefficients[t] = prepare(groups, c[t], columns / F::group, minima[t] + at / F::group);
      add(coefficients);
      for (auto& row : b) row.skip(columns);
    };
    for (size_t at = 0; at < whole; at += kSpan)
      span(at, std::integral_constant<size_t, kSpan>{}, [&](const auto& coefficients) {
        if constexpr (requires { typename F::Nibbles; }) {
          axpy_nibbles<F>(b, later, coefficients, sums, at);
        } else {
          axpy_chunks<F, 4>(b, later, coefficients, sums, at);
        }
      });
    if constexpr (F::block == 32) {
      const auto rest = [&]<int chunks>() {
        span(whole, std::integral_constant<size_t, chunks * 64>{}, [&](const auto& coefficients) {
          axpy_chunks<F, chunks>(b, later, coefficients, sums, whole);
        });
      };
      const size_t chunks = (k - whole) / 64;
      if (chunks == 1) rest.template operator()<1>();
      if (chunks == 2) rest.template operator()<2>();
      if (chunks == 3) rest.template operator()<3>();
    }
  }
  const auto place = [&](size_t j) {
    if constexpr (requires { typename F::Nibbles; }) {
      if (j < whole) return j - j % 128 + F::Nibbles::place(j % 128);
    }
    const size_t in = j % 64;
    return j - in + in / 4 % 4 * 16 + in / 16 * 4 + in % 4;
  };
  for (size_t t = 0; t < tokens; ++t)
    for (size_t j = 0; j < k; ++j)
      x.y[t * x.y_stride + from + j] += sums[t][place(j)] - minima[t][j / F::group];
}

template <size_t tokens, class Rows>
FALLOW_INLINE void axpy(const Rows& w, const int32_t* rows, size_t begin, size_t n, size_t k,
                        const Tokens& x) {
  using F = typename Rows::Format;
  if (n == 0) return;
  const size_t whole = k - k % 64;
  for (size_t at = 0; at < whole; at += kSlab)
    axpy_slab<tokens>(w, rows, begin, n, at, whole - at < kSlab ? whole - at : kSlab, x);
  if (whole == k) return;
  for (size_t i = 0; i < n; ++i) {
    auto row = w[row_of(rows, begin, i)];
    row.skip(whole);
    for (size_t t = 0; t < tokens; ++t)
      portable_kernels().axpy_rows[F::type](row.b, F::bytes, nullptr, 0, 1, 32,
                                            x.c + t * x.stride + i, x.y + t * x.y_stride + whole);
  }
}

template <class F>
void axpy_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const float* coefficient, float* y) {
  axpy<1>(Whole<F>{w, row_bytes}, rows, begin, n, k, {coefficient, 0, y, 0});
}

template <class F>
void axpy_tokens(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                 const float* coefficient, size_t from, size_t tokens, float* y, size_t stride) {
  const Whole<F> matrix{w, row_bytes};
  in_groups(tokens, [&]<size_t count>(size_t t) {
    axpy<count>(matrix, nullptr, begin, n, k, {coefficient + t * from, from, y + t * stride, stride});
  });
}

// The sum of the lanes of each of four registers.
FALLOW_INLINE __m128i sum_lanes4(const __m512i* v) {
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  };
  const __m512i first = halves(v[0], v[1]), second = halves(v[2], v[3]);
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second),
                                       _mm512_unpackhi_epi64(first, second));
  const __m256i pair =
      _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(pair), _mm256_extracti128_si256(pair, 1));
}

// The products of one quarter of the columns serve four rows, so that x is loaded once for them.
void gemv_two_bits(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                   size_t k, const Activation& x, float* y) {
  constexpr size_t kRows = 4;
  const OneScale input(x.x, k);
  const size_t quarter = k / 4;
  const __m512i bits = _mm512_set1_epi8(3);
  const size_t ahead = kPrefetch / row_bytes + 1;
  const auto row_at = [&](size_t i) {  // the last row stands in for those that are not there
    return w + row_of(rows, begin, std::min(i, n - 1)) * row_bytes;
  };
  for (size_t i = 0; i < n; i += kRows) {
    const uint8_t *row[kRows], *later[kRows];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) {
      row[r] = row_at(i + r);
      later[r] = row_at(i + r + ahead);
    }
    __m512i high[kRows], low[kRows];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) high[r] = low[r] = _mm512_setzero_si512();
    for (size_t p = 0; p < quarter; p += 64) {
      const __mmask64 there =
          quarter - p < 64 ? (uint64_t{1} << (quarter - p)) - 1 : ~uint64_t{0};
      __m512i codes[kRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        codes[r] = _mm512_maskz_loadu_epi8(there, row[r] + p);
        prefetch(later[r], 64);
      }
#pragma GCC unroll 4
      for (size_t part = 0; part < 4; ++part) {
        const __m512i x_high = load512(input.high() + part * quarter + p);
        const __m512i x_low = load512(input.low() + part * quarter + p);
#pragma GCC unroll 4
        for (size_t r = 0; r < kRows; ++r) {
          const __m512i code = _mm512_and_si512(codes[r], bits);
          codes[r] = _mm512_srli_epi16(codes[r], 2);
          high[r] = _mm512_dpbusd_epi32(high[r], code, x_high);
          low[r] = _mm512_dpbusd_epi32(low[r], code, x_low);
        }
      }
    }
    for (size_t r = 0; r < kRows; ++r)
      low[r] = _mm512_add_epi32(low[r], _mm512_slli_epi32(high[r], 8));
    alignas(16) int32_t sums[kRows];
    _mm_store_si128(reinterpret_cast<__m128i*>(sums), sum_lanes4(low));
    for (size_t r = 0; r < std::min(kRows, n - i); ++r)
      y[i + r] = input.dot(two_bits_scale(row[r], k), sums[r]);
  }
}

void panel_f32(const float* rows, size_t n, size_t k, float* panel) {
  for (size_t j = 0; j < k; j += 16)
    for (size_t half = 0; half < kPanel; half += 16) {
      __m512i block[16];
      for (size_t r = 0; r < 16; ++r)
        block[r] = half + r < n
                       ? _mm512_maskz_loadu_epi32(first_lanes(k - j), rows + (half + r) * k + j)
                       : _mm512_setzero_si512();
      transpose16(block);
      for (size_t c = 0; c < 16 && j + c < k; ++c)
        _mm512_storeu_si512(panel + (j + c) * kPanel + half, block[c]);
    }
}

FALLOW_INLINE __m512 load_floats(const float* p) { return _mm512_loadu_ps(p); }
FALLOW_INLINE __m512 load_floats(const uint16_t* half) { return _mm512_cvtph_ps(load256(half)); }

template <int tokens, class Weight>
void gemm_tile(const Weight* a, size_t n, size_t k, const float* x, size_t x_stride, bool add,
               float* y, size_t stride) {
  __m512 sum[2][tokens];
  for (int t = 0; t < tokens; ++t) sum[0][t] = sum[1][t] = _mm512_setzero_ps();
  for (size_t j = 0; j < k; ++j) {
    const __m512 low = load_floats(a + j * kPanel), high = load_floats(a + j * kPanel + 16);
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
      const __m512 v = _mm512_set1_ps(x[static_cast<size_t>(t) * x_stride + j]);
      sum[0][t] = _mm512_fmadd_ps(low, v, sum[0][t]);
      sum[1][t] = _mm512_fmadd_ps(high, v, sum[1][t]);
    }
  }
  store_panel(sum, n, add, y, stride);
}

// Of float32, or of half precision for few tokens.
template <class Weight>
void gemm(const Weight* a, size_t n, size_t k, const float* x, size_t x_stride, size_t tokens,
          bool add, float* y, size_t stride) {
  in_groups<12>(tokens, [&]<size_t count>(size_t t) {
    gemm_tile<static_cast<int>(count)>(a, n, k, x + t * x_stride, x_stride, add, y + t * stride, stride);
  });
}

// 16 weights of a float row as float32.
struct L32 {
  static constexpr size_t bytes = 4;
  static __m512 load(const uint8_t* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
};
struct LF16 {
  static constexpr size_t bytes = 2;
  static __m512 load(const uint8_t* p, __mmask16 lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
  }
};
struct LBF16 {
  static constexpr size_t bytes = 2;
  static __m512 load(const uint8_t* p, __mmask16 lanes) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
  }
};

template <class L>
float dot_float(const uint8_t* a, const float* x, size_t n) {
  __m512 sum[4] = {};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j)
      sum[j] = _mm512_fmadd_ps(L::load(a + (i + 16 * j) * L::bytes, 0xFFFF),
                               _mm512_loadu_ps(x + i + 16 * j), sum[j]);
  for (; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    sum[0] = _mm512_fmadd_ps(L::load(a + i * L::bytes, lanes), _mm512_maskz_loadu_ps(lanes, x + i),
                             sum[0]);
  }
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

template <class L>
void axpy_float(float c, const uint8_t* a, size_t n, float* y) {
  const __m512 factor = _mm512_set1_ps(c);
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 before = _mm512_maskz_loadu_ps(lanes, y + i);
    _mm512_mask_storeu_ps(y + i, lanes,
                          _mm512_fmadd_ps(factor, L::load(a + i * L::bytes, lanes), before));
  }
}

template <class L>
void gemv_rows_float(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                     size_t n, size_t k, const Activation& x, float* y) {
  gemv_floats(w, row_bytes, rows, begin, n, k, x, dot_float<L>, y);
}

template <class L>
void axpy_rows_float(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                     size_t n, size_t k, const float* coefficient, float* y) {
  axpy_floats(w, row_bytes, rows, begin, n, k, coefficient, axpy_float<L>, y);
}

float sum_squares(const float* x, size_t n) {
  return dot_float<L32>(reinterpret_cast<const uint8_t*>(x), x, n);
}

void to_f16(const float* x, size_t n, uint16_t* y) {
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    _mm256_mask_storeu_epi16(y + i, lanes,
                             _mm512_cvtps_ph(_mm512_maskz_loadu_ps(lanes, x + i),
                                             _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

template <class F>
void decode_blocks_512(const uint8_t* b, size_t k, float* y) {
  using G = Groups<F::group>;
  size_t at = 0;
  const auto span = [&](auto count) {
    constexpr int chunks = decltype(count)::value;
    typename G::V s, m;
    F::groups(b, chunks * 64 / F::group, s, m);
    if constexpr (!F::has_min) m = G::mul(s, G::set1(static_cast<float>(F::offset)));
    for (int j = 0; j < chunks; ++j) {
      const __m512i q = F::chunk(b, j);
      alignas(64) uint8_t bytes[64];
      alignas(64) float scale[16], minimum[16];
      _mm512_store_si512(bytes, q);
      _mm512_store_ps(scale, G::spread(s, j));
      _mm512_store_ps(minimum, G::spread(m, j));
      for (int i = 0; i < 4; ++i) {  // 16 columns share lanes 4 i..4 i + 3 of the spread
        const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load128(bytes + 16 * i)));
        _mm512_storeu_ps(y + at + 64 * j + 16 * i,
                         _mm512_fmsub_ps(v, _mm512_set1_ps(scale[4 * i]),
                                         _mm512_set1_ps(minimum[4 * i])));
      }
    }
    at += 64 * chunks;
    b += 64 * chunks / F::block * F::bytes;
  };
  while (at + kSpan <= k) span(std::integral_constant<int, 4>{});
  if constexpr (F::block == 32) {
    while (at + 64 <= k) span(std::integral_constant<int, 1>{});
    if (at < k) {  // one more block, as the first of two
      uint8_t two[2 * F::bytes] = {};
      float decoded[64];
      std::memcpy(two, b, F::bytes);
      decode_blocks_512<F>(two, 64, decoded);
      std::memcpy(y + at, decoded, 32 * sizeof(float));
    }
  }
}

template <class L>
void decode_float(const uint8_t* row, size_t k, float* y) {
  for (size_t i = 0; i < k; i += 16) {
    const __mmask16 lanes = first_lanes(k - i);
    _mm512_mask_storeu_ps(y + i, lanes, L::load(row + i * L::bytes, lanes));
  }
}

void decode(uint32_t type, const uint8_t* row, size_t k, float* y) {
  switch (type) {
    case kF32: return decode_float<L32>(row, k, y);
    case kF16: return decode_float<LF16>(row, k, y);
    case kBF16: return decode_float<LBF16>(row, k, y);
    case kQ4_0: return decode_blocks_512<V4_0>(row, k, y);
    case kQ4_1: return decode_blocks_512<V4_1>(row, k, y);
    case kQ5_0: return decode_blocks_512<V5_0>(row, k, y);
    case kQ5_1: return decode_blocks_512<V5_1>(row, k, y);
    case kQ8_0: return decode_blocks_512<V8_0>(row, k, y);
    case kQ4_K: return decode_blocks_512<V4_K>(row, k, y);
    case kQ5_K: return decode_blocks_512<V5_K>(row, k, y);
    case kQ6_K: return decode_blocks_512<V6_K>(row, k, y);
    default: return portable_kernels().decode(type, row, k, y);
  }
}

void quantize(const float* x, size_t k, int8_t* high, int8_t* low, float* d, float* sum,
              float* sum16) {
  constexpr float kLargest = 32512;  // see the portable twin
  const __m512i half = _mm512_set1_epi32(128);
  for (size_t b = 0; b < k / 32; ++b) {
    const __m512 first = _mm512_loadu_ps(x + 32 * b), second = _mm512_loadu_ps(x + 32 * b + 16);
    const float largest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(first), _mm512_abs_ps(second)));
    d[b] = largest / kLargest;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? kLargest / largest : 0.0f);
    const __m512i values[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(first, inverse)),
                               _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse))};
    for (int h = 0; h < 2; ++h) {
      const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(values[h], half), 8);
      const __m512i rest = _mm512_sub_epi32(values[h], _mm512_slli_epi32(top, 8));
      const size_t at = 32 * b + 16 * static_cast<size_t>(h);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + at), _mm512_cvtepi32_epi8(top));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + at), _mm512_cvtepi32_epi8(rest));
      sum16[at / 16] = d[b] * static_cast<float>(_mm512_reduce_add_epi32(values[h]));
    }
    sum[b] = sum16[2 * b] + sum16[2 * b + 1];
  }
}

// 16 floats; see shared.h. Masks take the place of its `in_place`.
struct V {
  using F = __m512;
  static FALLOW_INLINE F splat(float v) { return _mm512_set1_ps(v); }
  static FALLOW_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static FALLOW_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static FALLOW_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static FALLOW_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static FALLOW_INLINE F round(F v) { return _mm512_roundscale_ps(v, 0); }
  static FALLOW_INLINE F scale(F p, F n) { return _mm512_scalef_ps(p, n); }
};

float softmax_numerators(float* x, size_t n, float& largest) {
  __m512 most = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
  for (size_t i = 0; i < n; i += 16)
    most = _mm512_mask_max_ps(most, first_lanes(n - i), most, _mm512_maskz_loadu_ps(first_lanes(n - i), x + i));
  largest = _mm512_reduce_max_ps(most);
  const __m512 top = _mm512_set1_ps(largest);
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512 e = exp_of<V>(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, x + i), top));
    _mm512_mask_storeu_ps(x + i, lanes, e);
    sum = _mm512_mask_add_ps(sum, lanes, sum, e);
  }
  return _mm512_reduce_add_ps(sum);
}

FALLOW_INLINE __m512i magnitude_bits(const uint32_t* from, __mmask16 lanes) {
  return _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes, from), _mm512_set1_epi32(0x7FFFFFFF));
}

size_t count_above(const uint32_t* from, size_t n, uint32_t limit) {
  const __m512i most = _mm512_set1_epi32(static_cast<int>(limit));
  __m512i counts[4] = {};
  const auto count = [&](__m512i& sum, __mmask16 lanes, size_t i) {
    const __mmask16 larger = _mm512_cmpgt_epu32_mask(magnitude_bits(from + i, lanes), most);
    sum = _mm512_mask_add_epi32(sum, larger, sum, _mm512_set1_epi32(1));
  };
  const size_t whole = n / 64 * 64;
  for (size_t i = 0; i < whole; i += 64)
    for (size_t j = 0; j < 4; ++j) count(counts[j], 0xFFFF, i + 16 * j);
  for (size_t i = whole; i < n; i += 16) count(counts[0], first_lanes(n - i), i);
  return static_cast<size_t>(_mm512_reduce_add_epi32(
      _mm512_add_epi32(_mm512_add_epi32(counts[0], counts[1]), _mm512_add_epi32(counts[2], counts[3]))));
}

size_t keep_between(const uint32_t* from, size_t n, uint32_t low, uint32_t high, uint32_t* to) {
  const __m512i least = _mm512_set1_epi32(static_cast<int>(low)), most = _mm512_set1_epi32(static_cast<int>(high));
  size_t kept = 0;
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512i bits = magnitude_bits(from + i, lanes);
    const __mmask16 inside = _mm512_mask_cmple_epu32_mask(_mm512_mask_cmpge_epu32_mask(lanes, bits, least), bits, most);
    _mm512_storeu_si512(to + kept, _mm512_maskz_compress_epi32(inside, bits));
    kept += static_cast<size_t>(__builtin_popcount(inside));
  }
  return kept;
}

float topk_threshold(const float* magnitudes, size_t n, size_t k) {
  return topk_threshold_of(magnitudes, n, k, count_above, keep_between);
}

size_t list_nonzero(const float* values, size_t begin, size_t end, int32_t* list) {
  size_t n = 0;
  __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(begin)),
                                   _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  for (size_t i = begin; i < end; i += 16, index = _mm512_add_epi32(index, _mm512_set1_epi32(16))) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(end - i), values + i);
    const __mmask16 there = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const auto count = static_cast<size_t>(__builtin_popcount(there));
    _mm512_mask_storeu_epi32(list + n, first_lanes(count), _mm512_maskz_compress_epi32(there, index));
    n += count;
  }
  return n;
}

template <class Function>
void in_lanes(float* x, size_t n, Function function) {
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    _mm512_mask_storeu_ps(x + i, lanes, function(_mm512_maskz_loadu_ps(lanes, x + i)));
  }
}

void silu(float* x, size_t n) { in_lanes(x, n, silu_of<V>); }
void gelu_tanh(float* x, size_t n) { in_lanes(x, n, gelu_tanh_of<V>); }

template <class F>
void add_axpy(Kernels& table) {
  table.axpy_rows[F::type] = axpy_rows<F>;
  table.axpy_tokens[F::type] = axpy_tokens<F>;
}

template <class L>
void add_lanes(Kernels& table) {
  table.gemv_rows[L::type] = gemv_lanes<L>;
  table.gemv_tokens[L::type] = gemv_lanes_tokens<L>;
  table.gemv_tiles[L::type] = gemv_tiles<L>;
}

template <class F>
void add_axpy_k(Kernels& table) {
  table.axpy_rows[F::type] = axpy_k_rows<F>;
  table.axpy_tokens[F::type] = axpy_k_tokens<F, KRows>;
  table.axpy_tiles[F::type] = axpy_k_tokens<F, KTile>;
}

template <class L>
void add_float(Kernels& table, uint32_t type) {
  table.gemv_rows[type] = gemv_rows_float<L>;
  table.axpy_rows[type] = axpy_rows_float<L>;
}

// For processors with an instruction that counts bits; the others do as AVX2 does.
__attribute__((target("avx512vpopcntdq"))) void and_tile(const uint64_t* const* rows,
                                                         const uint64_t* const* others,
                                                         size_t words, uint32_t* counts) {
  static_assert(kBitTile == 4);
  __m512i sums[4][4];
  for (auto& row : sums)
    for (__m512i& sum : row) sum = _mm512_setzero_si512();
  for (size_t i = 0; i < words; i += 8) {
    __m512i other[4];
#pragma GCC unroll 4
    for (size_t c = 0; c < 4; ++c) other[c] = _mm512_loadu_si512(others[c] + i);
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) {
      const __m512i row = _mm512_loadu_si512(rows[r] + i);
#pragma GCC unroll 4
      for (size_t c = 0; c < 4; ++c)
        sums[r][c] = _mm512_add_epi64(
            sums[r][c], _mm512_popcnt_epi64(_mm512_and_si512(row, other[c])));
    }
  }
  // Adds up 16 sums of eight lanes each, to one register of 16 lanes. First two sums share lanes,
  // then columns stand side by side in each quarter, then quarters are added and rows follow rows.
  __m512i rows_of[4];
#pragma GCC unroll 4
  for (size_t r = 0; r < 4; ++r) {
    const __m512i even = _mm512_add_epi64(sums[r][0], _mm512_slli_epi64(sums[r][2], 32));
    const __m512i odd = _mm512_add_epi64(sums[r][1], _mm512_slli_epi64(sums[r][3], 32));
    rows_of[r] = _mm512_add_epi64(_mm512_unpacklo_epi64(even, odd),
                                  _mm512_unpackhi_epi64(even, odd));  // columns 0, 2, 1, 3
  }
  const auto halved = [](__m512i a, __m512i b) {
    return _mm512_add_epi64(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
  };
  const __m512i all = halved(halved(rows_of[0], rows_of[1]), halved(rows_of[2], rows_of[3]));
  _mm512_storeu_si512(counts, _mm512_shuffle_epi32(all, _MM_PERM_DBCA));
}

Kernels make() {
  Kernels table = portable_kernels();  // Q2_K and Q3_K stay scalar
  table.name = "avx512";
  if (const Kernels* narrow = avx2_kernels())  // which every such processor has
    for (const uint32_t type : {kIQ4_NL, kIQ4_XS, kMXFP4}) {
      table.gemv_rows[type] = narrow->gemv_rows[type];
      table.gemv_tiles[type] = narrow->gemv_tiles[type];
      table.panel_bytes[type] = narrow->panel_bytes[type];
    }
  add_lanes<LanesOf32<Q4_0>>(table);
  add_lanes<LanesOf32<Q4_1>>(table);
  add_lanes<LanesOf32<Q5_0>>(table);
  add_lanes<LanesOf32<Q5_1>>(table);
  add_lanes<LanesOf32<Q8_0>>(table);
  add_lanes<LanesOfK<Block4_K>>(table);
  add_lanes<LanesOfK<Block5_K>>(table);
  table.gemv_rows[kQ6_K] = gemv_rows_q6_k;
  table.gemv_tokens[kQ6_K] = gemv_tokens_q6_k;
  add_axpy<V4_0>(table);
  add_axpy<V4_1>(table);
  add_axpy<V5_0>(table);
  add_axpy<V5_1>(table);
  add_axpy<V8_0>(table);
  add_axpy<V6_K>(table);
  add_axpy_k<Q4_K>(table);
  add_axpy_k<Q5_K>(table);
  table.gemv_rows[kTwoBits] = gemv_two_bits;
  add_float<L32>(table, kF32);
  add_float<LF16>(table, kF16);
  add_float<LBF16>(table, kBF16);
  table.decode = decode;
  table.quantize = quantize;
  table.panel_f32 = panel_f32;
  table.gemm_f32 = gemm<float>;
  table.gemm_f16 = gemm<uint16_t>;
  add_bytes(table);
  table.to_f16 = to_f16;
  table.sum_squares = sum_squares;
  table.softmax_numerators = softmax_numerators;
  table.topk_threshold = topk_threshold;
  table.list_nonzero = list_nonzero;
  table.and_tile = avx2_kernels()->and_tile;
  if (__builtin_cpu_supports("avx512vpopcntdq")) table.and_tile = and_tile;
  table.silu = silu;
  table.gelu_tanh = gelu_tanh;
  return table;
}

}  // namespace

const Kernels* avx512_kernels() {
  static const bool runs = __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vnni");
  if (!runs) return nullptr;
  static const Kernels table = make();
  return &table;
}

}  // namespace fallow

#else

namespace fallow {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fallow

#endif
