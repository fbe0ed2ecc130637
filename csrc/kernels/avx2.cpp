// AVX2 with FMA and F16C: what x86 without AVX-512 runs. Compiled with those flags and called only
// where the processor has them; see avx512.cpp.
#include "kernels/shared.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "kernels/avx2_lanes.h"

namespace fallow {
namespace {

// Weights are unpacked 32 at a time, in order, into one register.
constexpr size_t kChunk = 32;

FALLOW_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
FALLOW_INLINE __m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

FALLOW_INLINE float sum_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

FALLOW_INLINE int32_t sum_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

FALLOW_INLINE float load_half(const uint8_t* p) { return _cvtsh_ss(load_u16(p)); }

// 16 bytes: low nibbles, then high nibbles.
FALLOW_INLINE __m256i nibble_block(const uint8_t* p) {
  const __m128i v = load128(p);
  const __m256i both =
      _mm256_inserti128_si256(_mm256_castsi128_si256(v), _mm_srli_epi16(v, 4), 1);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// 16 in every byte whose bit is set.
FALLOW_INLINE __m256i sixteens(uint32_t bits) {
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(static_cast<int>(bits)),
      _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
  const __m256i wanted = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ULL));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, wanted), wanted);
  return _mm256_and_si256(set, _mm256_set1_epi8(16));
}

// chunk(b, j): columns [32 j, 32 j + 32) of a block. groups(b, s, m): its scales and minima.
struct W4_0 : Q4_0 {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int) { return nibble_block(b + 2); }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) { s[0] = load_half(b); }
};
struct W4_1 : Q4_1 {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int) { return nibble_block(b + 4); }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) {
    s[0] = load_half(b);
    m[0] = -load_half(b + 2);
  }
};
struct W5_0 : Q5_0 {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int) {
    return _mm256_or_si256(nibble_block(b + 6), sixteens(load_u32(b + 2)));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) { s[0] = load_half(b); }
};
struct W5_1 : Q5_1 {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int) {
    return _mm256_or_si256(nibble_block(b + 8), sixteens(load_u32(b + 4)));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) {
    s[0] = load_half(b);
    m[0] = -load_half(b + 2);
  }
};
struct W8_0 : Q8_0 {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int) {
    return _mm256_xor_si256(load256(b + 2), _mm256_set1_epi8(static_cast<char>(128)));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) { s[0] = load_half(b); }
};

FALLOW_INLINE void k_groups(const uint8_t* b, float* s, float* m) {
  const uint32_t a = load_u32(b + 4), c = load_u32(b + 8), e = load_u32(b + 12);
  const uint32_t s_high = (e & 0x0F0F0F0F) | (a >> 2 & 0x30303030);
  const uint32_t m_high = (e >> 4 & 0x0F0F0F0F) | (c >> 2 & 0x30303030);
  const __m128i scales = _mm_set_epi32(static_cast<int>(m_high), static_cast<int>(c & 0x3F3F3F3F),
                                       static_cast<int>(s_high), static_cast<int>(a & 0x3F3F3F3F));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(scales));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(scales, 8)));
  _mm256_storeu_ps(s, _mm256_mul_ps(low, _mm256_set1_ps(load_half(b))));
  _mm256_storeu_ps(m, _mm256_mul_ps(high, _mm256_set1_ps(load_half(b + 2))));
}

FALLOW_INLINE __m256i k_nibbles(const uint8_t* p, int j) {
  __m256i v = load256(p + 32 * (j / 2));
  if (j % 2) v = _mm256_srli_epi16(v, 4);
  return _mm256_and_si256(v, _mm256_set1_epi8(15));
}

struct W4_K : Q4_K {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int j) { return k_nibbles(b + 16, j); }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) { k_groups(b, s, m); }
};
struct W5_K : Q5_K {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int j) {
    const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << j));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(load256(b + 16), bit), bit);
    return _mm256_or_si256(k_nibbles(b + 48, j), _mm256_and_si256(set, _mm256_set1_epi8(16)));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) { k_groups(b, s, m); }
};
struct W6_K : Q6_K {
  static FALLOW_INLINE __m256i chunk(const uint8_t* b, int j) {
    const int half = j / 4, part = j % 4;
    __m256i low = load256(b + 64 * half + 32 * (part % 2));
    if (part / 2) low = _mm256_srli_epi16(low, 4);
    const __m256i top = _mm256_srl_epi16(load256(b + 128 + 32 * half), _mm_cvtsi32_si128(2 * part));
    const __m256i high = _mm256_slli_epi16(_mm256_and_si256(top, _mm256_set1_epi8(3)), 4);
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(15)), high);
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) {
    const __m256 d = _mm256_set1_ps(load_half(b + 208));
    const __m128i scales = load128(b + 192);
    _mm256_storeu_ps(s, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales)), d));
    const __m256i rest = _mm256_cvtepi8_epi32(_mm_srli_si128(scales, 8));
    _mm256_storeu_ps(s + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(rest), d));
  }
};

constexpr size_t kPrefetch = 4096;  // bytes ahead of the work, at least

// One value for both halves of a chunk, or one for each where groups are 16.
template <class F>
FALLOW_INLINE __m256 spread(const float* groups, int chunk) {
  if constexpr (F::group == 32) return _mm256_set1_ps(groups[chunk]);
  return _mm256_set_m128(_mm_set1_ps(groups[2 * chunk + 1]), _mm_set1_ps(groups[2 * chunk]));
}

// Eight sums of four products of a chunk with x at a column, both planes. Products of a byte pair
// stay within 16 bits for up to 6 bits (63 * 128 * 2); 8-bit weights meet whole 16-bit values.
template <class F>
FALLOW_INLINE __m256i dot4(const uint8_t* b, int j, const Activation& x, size_t column) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (F::type == kQ8_0) {
    const auto half = [&](size_t at) {
      const __m256i w = _mm256_cvtepi8_epi16(load128(b + 2 + at));
      const __m256i high = _mm256_cvtepi8_epi16(load128(x.high + column + at));
      const __m256i low = _mm256_cvtepi8_epi16(load128(x.low + column + at));
      return _mm256_madd_epi16(w, _mm256_add_epi16(_mm256_slli_epi16(high, 8), low));
    };
    return _mm256_add_epi32(half(0), half(16));
  } else {
    const __m256i q = F::chunk(b, j);
    const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(q, load256(x.high + column)), ones);
    const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(q, load256(x.low + column)), ones);
    return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
  }
}

// Weights around zero.
template <class F>
FALLOW_INLINE __m256i centred(const uint8_t* b, int j) {
  return _mm256_sub_epi8(F::chunk(b, j), _mm256_set1_epi8(static_cast<char>(F::centre)));
}

void gemv_two_bits(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                   size_t k, const Activation& x, float* y) {
  const OneScale input(x.x, k);
  const size_t quarter = k / 4;
  const __m256i bits = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  const size_t ahead = kPrefetch / row_bytes + 1;
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* row = w + row_of(rows, begin, i) * row_bytes;
    const uint8_t* later =
        i + ahead < n ? w + row_of(rows, begin, i + ahead) * row_bytes : nullptr;
    __m256i high = _mm256_setzero_si256(), low = high;
    for (size_t p = 0; p < quarter; p += kChunk) {
      prefetch(later, kChunk);
      uint8_t last[kChunk] = {};
      if (quarter - p < kChunk) std::memcpy(last, row + p, quarter - p);
      __m256i codes = load256(quarter - p < kChunk ? last : row + p);
      __m256i some_high = _mm256_setzero_si256(), some_low = some_high;
#pragma GCC unroll 4
      for (size_t part = 0; part < 4; ++part) {  // 16 bits hold 8 products of at most 3 * 128
        const __m256i code = _mm256_and_si256(codes, bits);
        const size_t at = part * quarter + p;
        codes = _mm256_srli_epi16(codes, 2);
        some_high = _mm256_add_epi16(some_high, _mm256_maddubs_epi16(code, load256(input.high() + at)));
        some_low = _mm256_add_epi16(some_low, _mm256_maddubs_epi16(code, load256(input.low() + at)));
      }
      high = _mm256_add_epi32(high, _mm256_madd_epi16(some_high, ones));
      low = _mm256_add_epi32(low, _mm256_madd_epi16(some_low, ones));
    }
    y[i] = input.dot(two_bits_scale(row, k),
                     sum_lanes(_mm256_add_epi32(_mm256_slli_epi32(high, 8), low)));
  }
}

template <class F>
void gemv_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const Activation& x, float* y) {
  constexpr int chunks = F::block / kChunk, groups = F::block / F::group;
  const float* sums = F::group == 16 ? x.sum16 : x.sum;
  const size_t ahead = kPrefetch / row_bytes + 1;
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* b = w + row_of(rows, begin, i) * row_bytes;
    const uint8_t* later =
        i + ahead < n ? w + row_of(rows, begin, i + ahead) * row_bytes : nullptr;
    __m256 acc = _mm256_setzero_ps();
    float minima = 0;
    for (size_t at = 0; at < k; at += F::block, b += F::bytes) {
      prefetch(later, F::bytes);
      float s[groups], m[groups];
      F::groups(b, s, m);
      for (int g = 0; g < groups; ++g) {
        const size_t group = at / F::group + static_cast<size_t>(g);
        if constexpr (F::has_min) {
          minima += m[g] * sums[group];
        } else if constexpr (F::type != kQ8_0) {
          minima += F::offset * s[g] * sums[group];
        }
        s[g] *= x.d[group * F::group / 32];
      }
#pragma GCC unroll 8
      for (int j = 0; j < chunks; ++j) {
        const __m256i sum = dot4<F>(b, j, x, at + kChunk * static_cast<size_t>(j));
        acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), spread<F>(s, j), acc);
      }
    }
    y[i] = sum_lanes(acc) - minima;
  }
}

// sums += four rows of one block times their coefficients. Within 32 columns the order is that of
// byte interleaving: lane l of register i holds columns 16 l + 4 i + (0..3).
template <class F>
FALLOW_INLINE void axpy_block(const uint8_t* const* b, const float* c, float* sums, float* minima) {
  constexpr int chunks = F::block / kChunk, groups = F::block / F::group;
  float s[4][groups], scale[groups];
  int8_t q[4][groups];  // c * s with one scale for the four rows
  for (int r = 0; r < 4; ++r) {
    float m[groups];
    F::groups(b[r], s[r], m);
    for (int g = 0; g < groups; ++g) {
      if constexpr (F::has_min) minima[g] += c[r] * (m[g] - F::centre * s[r][g]);
      s[r][g] *= c[r];
    }
  }
  round_coefficients(s, [](float v) { return _mm_cvtss_si32(_mm_set_ss(v)); }, q, scale);
  const auto spread_bytes = [&](int r, int j) {
    if constexpr (F::group == 32) return _mm256_set1_epi8(q[r][j]);
    return _mm256_set_m128i(_mm_set1_epi8(q[r][2 * j + 1]), _mm_set1_epi8(q[r][2 * j]));
  };
#pragma GCC unroll 2
  for (int j = 0; j < chunks; ++j) {
    __m256i w[4], size[4];  // weights with the sign of their coefficient, and its magnitude
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256i coefficient = spread_bytes(r, j);
      w[r] = _mm256_sign_epi8(centred<F>(b[r], j), coefficient);
      size[r] = _mm256_abs_epi8(coefficient);
    }
    const __m256 factor = spread<F>(scale, j);
    const __m256i size01 = _mm256_unpacklo_epi8(size[0], size[1]);
    const __m256i size23 = _mm256_unpacklo_epi8(size[2], size[3]);
    const auto add = [&](__m256i w01, __m256i w23, float* to) {
      const __m256i p01 = _mm256_maddubs_epi16(size01, w01);
      const __m256i p23 = _mm256_maddubs_epi16(size23, w23);
      const __m256i ones = _mm256_set1_epi16(1);
      const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(p01, p23), ones);
      const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(p01, p23), ones);
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), factor, _mm256_loadu_ps(to)));
      _mm256_storeu_ps(
          to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), factor, _mm256_loadu_ps(to + 8)));
    };
    float* to = sums + kChunk * static_cast<size_t>(j);
    add(_mm256_unpacklo_epi8(w[0], w[1]), _mm256_unpacklo_epi8(w[2], w[3]), to);
    add(_mm256_unpackhi_epi8(w[0], w[1]), _mm256_unpackhi_epi8(w[2], w[3]), to + 16);
  }
}

template <class F>
void axpy_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const float* coefficient, float* y) {
  axpy_in_slabs<F>(w, row_bytes, rows, begin, n, k, coefficient, kPrefetch / row_bytes + 4,
                   axpy_block<F>,
                   [](size_t j) { return j / 4 % 4 * 8 + j / 16 * 4 + j % 4; }, y);
}

// Eight weights of a float row as float32; the last ones of a row come one at a time.
struct L32 {
  static constexpr size_t bytes = 4;
  static FALLOW_INLINE __m256 load(const uint8_t* p) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  }
  static FALLOW_INLINE float one(const uint8_t* p) { return std::bit_cast<float>(load_u32(p)); }
};
struct LF16 {
  static constexpr size_t bytes = 2;
  static FALLOW_INLINE __m256 load(const uint8_t* p) { return _mm256_cvtph_ps(load128(p)); }
  static FALLOW_INLINE float one(const uint8_t* p) { return load_half(p); }
};
struct LBF16 {
  static constexpr size_t bytes = 2;
  static FALLOW_INLINE __m256 load(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
  }
  static FALLOW_INLINE float one(const uint8_t* p) { return load_bf16(p); }
};

template <class L>
FALLOW_INLINE float dot_float(const uint8_t* a, const float* x, size_t n) {
  __m256 sum[4] = {};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (size_t j = 0; j < 4; ++j)
      sum[j] = _mm256_fmadd_ps(L::load(a + (i + 8 * j) * L::bytes), _mm256_loadu_ps(x + i + 8 * j),
                               sum[j]);
  for (; i + 8 <= n; i += 8)
    sum[0] = _mm256_fmadd_ps(L::load(a + i * L::bytes), _mm256_loadu_ps(x + i), sum[0]);
  float total = sum_lanes(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]),
                                        _mm256_add_ps(sum[2], sum[3])));
  for (; i < n; ++i) total += L::one(a + i * L::bytes) * x[i];
  return total;
}

template <class L>
FALLOW_INLINE void axpy_float(float c, const uint8_t* a, size_t n, float* y) {
  const __m256 factor = _mm256_set1_ps(c);
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i,
                     _mm256_fmadd_ps(factor, L::load(a + i * L::bytes), _mm256_loadu_ps(y + i)));
  for (; i < n; ++i) y[i] += c * L::one(a + i * L::bytes);
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

// What attention decodes for every token; other types only prefill needs.
void decode(uint32_t type, const uint8_t* row, size_t k, float* y) {
  if (type != kF16) return portable_kernels().decode(type, row, k, y);
  size_t i = 0;
  for (; i + 8 <= k; i += 8) _mm256_storeu_ps(y + i, LF16::load(row + i * LF16::bytes));
  for (; i < k; ++i) y[i] = LF16::one(row + i * LF16::bytes);
}

float sum_squares(const float* x, size_t n) {
  return dot_float<L32>(reinterpret_cast<const uint8_t*>(x), x, n);
}

void to_f16(const float* x, size_t n, uint16_t* y) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) y[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

// Four registers of a panel times `tokens` columns of x.
template <int tokens>
FALLOW_INLINE void gemm_tile(const float* panel, size_t n, size_t k, const float* x,
                             size_t x_stride, bool add, float* y, size_t stride) {
  __m256 sum[tokens][4];
  for (int t = 0; t < tokens; ++t)
    for (int h = 0; h < 4; ++h) sum[t][h] = _mm256_setzero_ps();
  for (size_t j = 0; j < k; ++j) {
    const float* a = panel + j * kPanel;
#pragma GCC unroll 3
    for (int t = 0; t < tokens; ++t) {
      const __m256 v = _mm256_set1_ps(x[static_cast<size_t>(t) * x_stride + j]);
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h)
        sum[t][h] = _mm256_fmadd_ps(_mm256_loadu_ps(a + 8 * h), v, sum[t][h]);
    }
  }
  for (int t = 0; t < tokens; ++t) {
    float values[kPanel], *to = y + static_cast<size_t>(t) * stride;
    for (int h = 0; h < 4; ++h) _mm256_storeu_ps(values + 8 * h, sum[t][h]);
    for (size_t r = 0; r < n; ++r) to[r] = add ? to[r] + values[r] : values[r];
  }
}

void gemm_f32(const float* panel, size_t n, size_t k, const float* x, size_t x_stride,
              size_t tokens, bool add, float* y, size_t stride) {
  size_t t = 0;
  for (; t + 3 <= tokens; t += 3)
    gemm_tile<3>(panel, n, k, x + t * x_stride, x_stride, add, y + t * stride, stride);
  for (; t < tokens; ++t)
    gemm_tile<1>(panel, n, k, x + t * x_stride, x_stride, add, y + t * stride, stride);
}

// Eight floats; see shared.h.
struct V {
  using F = __m256;
  static constexpr size_t n = 8;
  static FALLOW_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static FALLOW_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static FALLOW_INLINE F splat(float v) { return _mm256_set1_ps(v); }
  static FALLOW_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static FALLOW_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static FALLOW_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static FALLOW_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static FALLOW_INLINE F round(F v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // In two steps, so that results below 2^-126 are right.
  static FALLOW_INLINE F scale(F p, F n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    const auto power = [](__m256i e) {
      return _mm256_castsi256_ps(
          _mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return p * power(half) * power(_mm256_sub_epi32(whole, half));
  }
};

float softmax_numerators(float* x, size_t n) { return softmax_numerators_of<V>(x, n); }
void silu(float* x, size_t n) { in_place<V>(x, n, silu_of<V>); }
void gelu_tanh(float* x, size_t n) { in_place<V>(x, n, gelu_tanh_of<V>); }

template <class F>
void add(Kernels& table) {
  table.gemv_rows[F::type] = gemv_rows<F>;
  table.axpy_rows[F::type] = axpy_rows<F>;
}

template <class L>
void add_lanes(Kernels& table) {
  table.gemv_rows[L::type] = gemv_lanes<L>;
}

template <class L>
void add_float(Kernels& table, uint32_t type) {
  table.gemv_rows[type] = gemv_rows_float<L>;
  table.axpy_rows[type] = axpy_rows_float<L>;
}

// Bits of every byte, from a table of nibbles (Mula's method).
FALLOW_INLINE __m256i bits_per_byte(__m256i v) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  return _mm256_add_epi8(
      _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble)),
      _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)));
}

// One row with all others: four sums of bytes are emptied before they can pass 255.
void and_tile(const uint64_t* const* rows, const uint64_t* const* others, size_t words,
              uint32_t* counts) {
  constexpr size_t kStep = 4, kMost = 31 * kStep;  // words of a register, and of 31 of them
  const __m256i zero = _mm256_setzero_si256();
  for (size_t r = 0; r < kBitTile; ++r) {
    __m256i sums[kBitTile] = {zero, zero, zero, zero};
    for (size_t begin = 0; begin < words; begin += kMost) {
      __m256i bytes[kBitTile] = {zero, zero, zero, zero};
      for (size_t i = begin; i < std::min(begin + kMost, words); i += kStep) {
        const __m256i row = load256(rows[r] + i);
        for (size_t c = 0; c < kBitTile; ++c)
          bytes[c] = _mm256_add_epi8(
              bytes[c], bits_per_byte(_mm256_and_si256(row, load256(others[c] + i))));
      }
      for (size_t c = 0; c < kBitTile; ++c)
        sums[c] = _mm256_add_epi64(sums[c], _mm256_sad_epu8(bytes[c], zero));
    }
    // Sums are below 2^31: their upper halves are zero.
    for (size_t c = 0; c < kBitTile; ++c)
      counts[r * kBitTile + c] = static_cast<uint32_t>(sum_lanes(sums[c]));
  }
}

Kernels make() {
  Kernels table = portable_kernels();  // what is not below stays scalar
  table.name = "avx2";
  add<W4_0>(table);
  add<W4_1>(table);
  add<W5_0>(table);
  add<W5_1>(table);
  add<W8_0>(table);
  add<W4_K>(table);
  add<W5_K>(table);
  add<W6_K>(table);
  add_lanes<LanesOf32<Q4_0>>(table);
  add_lanes<LanesOf32<Q4_1>>(table);
  add_lanes<LanesOf32<Q5_0>>(table);
  add_lanes<LanesOf32<Q5_1>>(table);
  add_lanes<LanesOfK<Q4_K>>(table);
  add_lanes<LanesOfK<Q5_K>>(table);
  add_lanes<LanesOf6_K>(table);
  table.gemv_rows[kTwoBits] = gemv_two_bits;
  add_float<L32>(table, kF32);
  add_float<LF16>(table, kF16);
  add_float<LBF16>(table, kBF16);
  table.decode = decode;
  table.gemm_f32 = gemm_f32;
  table.to_f16 = to_f16;
  table.sum_squares = sum_squares;
  table.softmax_numerators = softmax_numerators;
  table.and_tile = and_tile;
  table.silu = silu;
  table.gelu_tanh = gelu_tanh;
  return table;
}

}  // namespace

const Kernels* avx2_kernels() {
  static const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  if (!runs) return nullptr;
  static const Kernels table = make();
  return &table;
}

}  // namespace fallow

#else

namespace fallow {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fallow

#endif
