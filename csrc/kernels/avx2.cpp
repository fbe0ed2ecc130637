// AVX2 with FMA and F16C: what x86 without AVX-512 runs. Compiled with those flags and called only
// where the processor has them; see avx512.cpp.
#include "kernels/shared.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "kernels/avx2_lanes.h"

namespace fallow {
namespace {

FALLOW_INLINE float sum_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

FALLOW_INLINE float load_half(const uint8_t* p) { return _cvtsh_ss(load_u16(p)); }

constexpr size_t kPrefetch = 4096;  // bytes ahead of the work, at least

void gemv_two_bits(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                   size_t k, const Activation& x, float* y) {
  constexpr size_t kStep = 32;
  const OneScale input(x.x, k);
  const size_t quarter = k / 4;
  const __m256i bits = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  const size_t ahead = kPrefetch / row_bytes + 1;
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* row = w + row_of(rows, begin, i) * row_bytes;
    const uint8_t* later =
        i + ahead < n ? w + row_of(rows, begin, i + ahead) * row_bytes : nullptr;
    __m256i high = _mm256_setzero_si256(), low = high;
    for (size_t p = 0; p < quarter; p += kStep) {
      prefetch(later, kStep);
      uint8_t last[kStep] = {};
      if (quarter - p < kStep) std::memcpy(last, row + p, quarter - p);
      __m256i codes = load256(quarter - p < kStep ? last : row + p);
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
FALLOW_INLINE float dot_float(const uint8_t* a, const uint8_t* later, const float* x, size_t n) {
  __m256 sum[4] = {};
  size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    prefetch(later, 32 * L::bytes);
    for (size_t j = 0; j < 4; ++j)
      sum[j] = _mm256_fmadd_ps(L::load(a + (i + 8 * j) * L::bytes), _mm256_loadu_ps(x + i + 8 * j),
                               sum[j]);
  }
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
  const size_t ahead = kPrefetch / row_bytes + 1;
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* later = i + ahead < n ? w + row_of(rows, begin, i + ahead) * row_bytes : nullptr;
    y[i] = dot_float<L>(w + row_of(rows, begin, i) * row_bytes, later, x.x, k);
  }
}

// Four rows at a time, which load and store y once.
template <class L>
void axpy_rows_float(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                     size_t n, size_t k, const float* coefficient, float* y) {
  constexpr size_t kRows = 4;
  const auto row_at = [&](size_t i) { return w + row_of(rows, begin, i) * row_bytes; };
  size_t i = 0;
  for (; i + kRows <= n; i += kRows) {
    const uint8_t *row[kRows], *later[kRows];
    __m256 c[kRows];
    for (size_t r = 0; r < kRows; ++r) {
      row[r] = row_at(i + r);
      later[r] = i + r + kRows < n ? row_at(i + r + kRows) : nullptr;
      c[r] = _mm256_set1_ps(coefficient[i + r]);
    }
    size_t j = 0;
    for (; j + 32 <= k; j += 32) {
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) prefetch(later[r], 32 * L::bytes);
#pragma GCC unroll 4
      for (size_t part = j; part < j + 32; part += 8) {
        __m256 sum = _mm256_loadu_ps(y + part);
#pragma GCC unroll 4
        for (size_t r = 0; r < kRows; ++r)
          sum = _mm256_fmadd_ps(c[r], L::load(row[r] + part * L::bytes), sum);
        _mm256_storeu_ps(y + part, sum);
      }
    }
    for (size_t r = 0; r < kRows; ++r)
      axpy_float<L>(coefficient[i + r], row[r] + j * L::bytes, k - j, y + j);
  }
  for (; i < n; ++i) axpy_float<L>(coefficient[i], row_at(i), k, y);
}

// What attention decodes for every token; other types only prefill needs.
void decode(uint32_t type, const uint8_t* row, size_t k, float* y) {
  if (type != kF16) return portable_kernels().decode(type, row, k, y);
  size_t i = 0;
  for (; i + 8 <= k; i += 8) _mm256_storeu_ps(y + i, LF16::load(row + i * LF16::bytes));
  for (; i < k; ++i) y[i] = LF16::one(row + i * LF16::bytes);
}

void quantize(const float* x, size_t k, int8_t* high, int8_t* low, float* d, float* sum,
              float* sum16) {
  constexpr float kLargest = 32512;  // see the portable twin
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (size_t b = 0; b < k / 32; ++b) {
    const float* from = x + 32 * b;
    __m256 v[4], top = _mm256_setzero_ps();
    for (size_t i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(from + 8 * i);
      top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[i]));
    }
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    const float largest = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    d[b] = largest / kLargest;
    const __m256 inverse = _mm256_set1_ps(largest > 0 ? kLargest / largest : 0.0f);
    for (size_t h = 0; h < 2; ++h) {
      const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(v[2 * h], inverse));
      const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(v[2 * h + 1], inverse));
      sum16[2 * b + h] = d[b] * static_cast<float>(sum_lanes(_mm256_add_epi32(first, second)));
      const __m256i values = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
      const __m256i upper = _mm256_srai_epi16(_mm256_add_epi16(values, _mm256_set1_epi16(128)), 8);
      const __m256i lower = _mm256_sub_epi16(values, _mm256_slli_epi16(upper, 8));
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(upper, lower), 0xD8);
      const size_t at = 32 * b + 16 * h;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + at), _mm256_castsi256_si128(both));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + at), _mm256_extracti128_si256(both, 1));
    }
    sum[b] = sum16[2 * b] + sum16[2 * b + 1];
  }
}

float sum_squares(const float* x, size_t n) {
  return dot_float<L32>(reinterpret_cast<const uint8_t*>(x), nullptr, x, n);
}

void to_f16(const float* x, size_t n, uint16_t* y) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) y[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

FALLOW_INLINE __m256 load_floats(const float* p) { return _mm256_loadu_ps(p); }
FALLOW_INLINE __m256 load_floats(const uint16_t* half) { return _mm256_cvtph_ps(load128(half)); }

// Four registers of a panel times `tokens` columns of x. A panel of the cache comes from memory: a line of
// it, which is a step, is asked for kAsked bytes before it is needed.
template <int tokens, class Weight>
FALLOW_INLINE void gemm_tile(const Weight* panel, size_t n, size_t k, const float* x,
                             size_t x_stride, bool add, float* y, size_t stride) {
  constexpr size_t kAsked = 1024;
  __m256 sum[tokens][4];
  for (int t = 0; t < tokens; ++t)
    for (int h = 0; h < 4; ++h) sum[t][h] = _mm256_setzero_ps();
  for (size_t j = 0; j < k; ++j) {
    const Weight* line = panel + j * kPanel;
    if constexpr (std::is_same_v<Weight, uint16_t>)
      __builtin_prefetch(reinterpret_cast<const char*>(line) + kAsked);
    __m256 v[tokens];
#pragma GCC unroll 3
    for (int t = 0; t < tokens; ++t) v[t] = _mm256_set1_ps(x[static_cast<size_t>(t) * x_stride + j]);
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      const __m256 weights = load_floats(line + 8 * h);
#pragma GCC unroll 3
      for (int t = 0; t < tokens; ++t) sum[t][h] = _mm256_fmadd_ps(weights, v[t], sum[t][h]);
    }
  }
  for (int t = 0; t < tokens; ++t) {
    float values[kPanel], *to = y + static_cast<size_t>(t) * stride;
    for (int h = 0; h < 4; ++h) _mm256_storeu_ps(values + 8 * h, sum[t][h]);
    for (size_t r = 0; r < n; ++r) to[r] = add ? to[r] + values[r] : values[r];
  }
}

template <class Weight>
void gemm(const Weight* panel, size_t n, size_t k, const float* x, size_t x_stride, size_t tokens,
          bool add, float* y, size_t stride) {
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

float softmax_numerators(float* x, size_t n, float& largest) {
  return softmax_numerators_of<V>(x, n, largest);
}

// Of every mask of eight lanes, which those are, ascending, in a byte each.
constexpr auto kLanesOf = [] {
  std::array<uint64_t, 256> all{};
  for (size_t mask = 0; mask < all.size(); ++mask)
    for (uint64_t lane = 0, n = 0; lane < kLanes; ++lane)
      if (mask >> lane & 1) all[mask] |= lane << 8 * n++;
  return all;
}();

// The lanes of a mask in front, as they follow each other.
FALLOW_INLINE __m256i in_front(__m256i v, size_t mask) {
  const auto lanes = static_cast<long long>(kLanesOf[mask]);
  return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(lanes)));
}

FALLOW_INLINE __m256i first_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

// Bits of magnitudes [i, n), and -1, which is below them all, past the end.
FALLOW_INLINE __m256i magnitude_bits(const uint32_t* from, size_t i, size_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  if (n - i >= kLanes) return _mm256_and_si256(load256(from + i), magnitude);
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n - i)), first_numbers());
  const __m256i bits = _mm256_maskload_epi32(reinterpret_cast<const int*>(from + i), there);
  return _mm256_blendv_epi8(_mm256_set1_epi32(-1), _mm256_and_si256(bits, magnitude), there);
}

size_t count_above(const uint32_t* from, size_t n, uint32_t limit) {
  const __m256i most = _mm256_set1_epi32(static_cast<int>(limit));
  __m256i counts[4] = {};
  const auto count = [&](__m256i& sum, size_t i) {
    sum = _mm256_sub_epi32(sum, _mm256_cmpgt_epi32(magnitude_bits(from, i, n), most));
  };
  const size_t whole = n / (4 * kLanes) * (4 * kLanes);
  for (size_t i = 0; i < whole; i += 4 * kLanes)
    for (size_t j = 0; j < 4; ++j) count(counts[j], i + kLanes * j);
  for (size_t i = whole; i < n; i += kLanes) count(counts[0], i);
  return static_cast<size_t>(sum_lanes(
      _mm256_add_epi32(_mm256_add_epi32(counts[0], counts[1]), _mm256_add_epi32(counts[2], counts[3]))));
}

size_t keep_between(const uint32_t* from, size_t n, uint32_t low, uint32_t high, uint32_t* to) {
  const __m256i least = _mm256_set1_epi32(static_cast<int>(low)), most = _mm256_set1_epi32(static_cast<int>(high));
  size_t kept = 0;
  for (size_t i = 0; i < n; i += kLanes) {
    const __m256i bits = magnitude_bits(from, i, n);
    const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(least, bits), _mm256_cmpgt_epi32(bits, most));
    const auto inside = static_cast<unsigned>(~_mm256_movemask_ps(_mm256_castsi256_ps(outside)) & 255);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kept), in_front(bits, inside));
    kept += static_cast<size_t>(__builtin_popcount(inside));
  }
  return kept;
}

float topk_threshold(const float* magnitudes, size_t n, size_t k) {
  return topk_threshold_of(magnitudes, n, k, count_above, keep_between);
}

size_t list_nonzero(const float* values, size_t begin, size_t end, int32_t* list) {
  size_t n = 0, i = begin;
  __m256i index = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(begin)), first_numbers());
  for (; i + kLanes <= end; i += kLanes, index = _mm256_add_epi32(index, _mm256_set1_epi32(kLanes))) {
    const __m256 zero = _mm256_cmp_ps(_mm256_loadu_ps(values + i), _mm256_setzero_ps(), _CMP_EQ_OQ);
    const auto there = static_cast<unsigned>(~_mm256_movemask_ps(zero) & 255);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(list + n), in_front(index, there));
    n += static_cast<size_t>(__builtin_popcount(there));
  }
  for (; i < end; ++i) {
    list[n] = static_cast<int32_t>(i);
    n += values[i] != 0;
  }
  return n;
}

void silu(float* x, size_t n) { in_place<V>(x, n, silu_of<V>); }
void gelu_tanh(float* x, size_t n) { in_place<V>(x, n, gelu_tanh_of<V>); }

template <class F>
void add(Kernels& table) {
  table.gemv_rows[F::type] = gemv_rows<F>;
  table.gemv_tiles[F::type] = gemv_tiles<F>;
  table.axpy_rows[F::type] = axpy_rows<F>;
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
  add<Lanes32<Q4_0>>(table);
  add<Lanes32<Q4_1>>(table);
  add<Lanes32<Q5_0>>(table);
  add<Lanes32<Q5_1>>(table);
  add<LanesK<Q4_K>>(table);
  add<LanesK<Q5_K>>(table);
  add<Lanes6_K>(table);
  table.axpy_tiles[kQ4_K] = axpy_tiles<LanesK<Q4_K>>;
  table.axpy_tiles[kQ5_K] = axpy_tiles<LanesK<Q5_K>>;
  table.gemv_rows[kQ8_0] = gemv_digits<Signed8_0, false>;  // both digits at once, as those that follow
  table.gemv_rows[kIQ4_NL] = gemv_digits<LookedUp<IQ4_NL>, false>;
  table.gemv_rows[kIQ4_XS] = gemv_digits<LookedUp<IQ4_XS>, false>;
  table.gemv_rows[kMXFP4] = gemv_digits<LookedUp<MXFP4>, false>;
  table.gemv_tiles[kQ8_0] = gemv_tiles<Signed8_0>;
  table.gemv_tiles[kIQ4_NL] = gemv_tiles<LookedUp<IQ4_NL>>;
  table.gemv_tiles[kIQ4_XS] = gemv_tiles<LookedUp<IQ4_XS>>;
  table.axpy_rows[kQ8_0] = axpy_rows<Q8_0>;
  table.axpy_tiles[kQ8_0] = axpy_tiles<Q8_0>;
  table.gemv_rows[kTwoBits] = gemv_two_bits;
  add_float<L32>(table, kF32);
  add_float<LF16>(table, kF16);
  add_float<LBF16>(table, kBF16);
  table.decode = decode;
  add_avx2_bytes(table);
  table.quantize = quantize;
  table.gemm_f32 = gemm<float>;
  table.gemm_f16 = gemm<uint16_t>;
  table.to_f16 = to_f16;
  table.sum_squares = sum_squares;
  table.softmax_numerators = softmax_numerators;
  table.topk_threshold = topk_threshold;
  table.list_nonzero = list_nonzero;
  table.and_tile = and_tile;
  table.silu = silu;
  table.gelu_tanh = gelu_tanh;
  return table;
}

// clang 14, Debian 12's, knows no __builtin_cpu_supports("f16c").
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace

const Kernels* avx2_kernels() {
  static const bool runs =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
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
