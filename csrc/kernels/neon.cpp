// NEON: what every 64-bit ARM runs. neon_dotprod.cpp compiles it once more, with byte
// products, which most processors since 2018 have.
#include "kernels/shared.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fallow {
namespace {

// Weights are unpacked 32 at a time, in order, into two registers.
constexpr size_t kChunk = 32;

FALLOW_INLINE float load_half(const uint8_t* p) {
  __fp16 half;
  std::memcpy(&half, p, sizeof half);
  return half;
}

// sum[i] += products of bytes 4 i .. 4 i + 3.
FALLOW_INLINE int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
  return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
}

// Weights around zero.
template <class F>
FALLOW_INLINE int8x16_t centred(uint8x16_t q) {
  return vsubq_s8(vreinterpretq_s8_u8(q), vdupq_n_s8(static_cast<int8_t>(F::centre)));
}

FALLOW_INLINE uint8x16_t low_nibbles(uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }
FALLOW_INLINE uint8x16_t high_nibbles(uint8x16_t v) { return vshrq_n_u8(v, 4); }

// 16 in every byte that has one of the bits set.
FALLOW_INLINE uint8x16_t sixteens(uint8x16_t v, uint8x16_t bits) {
  return vandq_u8(vtstq_u8(v, bits), vdupq_n_u8(16));
}

// 16 in the byte of every bit that is set, of 16 bits.
FALLOW_INLINE uint8x16_t sixteens(uint32_t bits) {
  const uint8x16_t spread = vcombine_u8(vdup_n_u8(static_cast<uint8_t>(bits)),
                                        vdup_n_u8(static_cast<uint8_t>(bits >> 8)));
  return sixteens(spread, vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)));
}

template <class F>
FALLOW_INLINE int8x16x2_t four_bits(const uint8_t* nibbles) {
  const uint8x16_t v = vld1q_u8(nibbles);
  return {centred<F>(low_nibbles(v)), centred<F>(high_nibbles(v))};
}

template <class F>
FALLOW_INLINE int8x16x2_t five_bits(const uint8_t* nibbles, uint32_t fifth) {
  const uint8x16_t v = vld1q_u8(nibbles);
  return {centred<F>(vorrq_u8(low_nibbles(v), sixteens(fifth))),
          centred<F>(vorrq_u8(high_nibbles(v), sixteens(fifth >> 16)))};
}

template <class F>
FALLOW_INLINE void line(const uint8_t* b, float* s, float* m) {
  s[0] = load_half(b);
  m[0] = -load_half(b + 2) - F::centre * s[0];
}

// chunk(b, j): columns [32 j, 32 j + 32) of a block, centred. groups(b, s, m): its scales, and the
// minima of centred weights.
struct W4_0 : Q4_0 {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int) { return four_bits<Q4_0>(b + 2); }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) { s[0] = load_half(b); }
};
struct W4_1 : Q4_1 {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int) { return four_bits<Q4_1>(b + 4); }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) { line<Q4_1>(b, s, m); }
};
struct W5_0 : Q5_0 {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int) {
    return five_bits<Q5_0>(b + 6, load_u32(b + 2));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) { s[0] = load_half(b); }
};
struct W5_1 : Q5_1 {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int) {
    return five_bits<Q5_1>(b + 8, load_u32(b + 4));
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) { line<Q5_1>(b, s, m); }
};
struct W8_0 : Q8_0 {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int) {
    return {vreinterpretq_s8_u8(vld1q_u8(b + 2)), vreinterpretq_s8_u8(vld1q_u8(b + 18))};
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) { s[0] = load_half(b); }
};

FALLOW_INLINE void store_scaled(int8x8_t v, float d, float* to) {
  const int16x8_t wide = vmovl_s8(v);
  vst1q_f32(to, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), d));
  vst1q_f32(to + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(wide)), d));
}

template <class F>
FALLOW_INLINE void k_groups(const uint8_t* b, float* s, float* m) {
  const uint32_t a = load_u32(b + 4), c = load_u32(b + 8), e = load_u32(b + 12);
  const uint64_t s_high = (e & 0x0F0F0F0F) | (a >> 2 & 0x30303030);
  const uint64_t m_high = (e >> 4 & 0x0F0F0F0F) | (c >> 2 & 0x30303030);
  store_scaled(vcreate_s8(s_high << 32 | (a & 0x3F3F3F3F)), load_half(b), s);
  store_scaled(vcreate_s8(m_high << 32 | (c & 0x3F3F3F3F)), load_half(b + 2), m);
  for (int g = 0; g < 8; ++g) m[g] -= F::centre * s[g];
}

FALLOW_INLINE uint8x16_t k_nibbles(const uint8_t* p, int j) {
  const uint8x16_t v = vld1q_u8(p + 32 * (j / 2));
  return j % 2 ? high_nibbles(v) : low_nibbles(v);
}

struct W4_K : Q4_K {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int j) {
    return {centred<Q4_K>(k_nibbles(b + 16, j)), centred<Q4_K>(k_nibbles(b + 32, j))};
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) {
    k_groups<Q4_K>(b, s, m);
  }
};
struct W5_K : Q5_K {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int j) {
    const uint8x16_t bit = vdupq_n_u8(static_cast<uint8_t>(1 << j));
    const auto half = [&](int at) {
      const uint8x16_t fifth = sixteens(vld1q_u8(b + 16 + at), bit);
      return centred<Q5_K>(vorrq_u8(k_nibbles(b + 48 + at, j), fifth));
    };
    return {half(0), half(16)};
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float* m) {
    k_groups<Q5_K>(b, s, m);
  }
};
struct W6_K : Q6_K {
  static FALLOW_INLINE int8x16x2_t chunk(const uint8_t* b, int j) {
    const int part = j % 4;
    const uint8_t *low = b + 64 * (j / 4) + 32 * (part % 2), *high = b + 128 + 32 * (j / 4);
    const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(4 - 2 * part));
    const auto half = [&](int at) {
      const uint8x16_t v = vld1q_u8(low + at);
      const uint8x16_t top = vandq_u8(vshlq_u8(vld1q_u8(high + at), shift), vdupq_n_u8(0x30));
      return centred<Q6_K>(vorrq_u8(part / 2 ? high_nibbles(v) : low_nibbles(v), top));
    };
    return {half(0), half(16)};
  }
  static FALLOW_INLINE void groups(const uint8_t* b, float* s, float*) {
    const int8x16_t scales = vreinterpretq_s8_u8(vld1q_u8(b + 192));
    const float d = load_half(b + 208);
    store_scaled(vget_low_s8(scales), d, s);
    store_scaled(vget_high_s8(scales), d, s + 8);
  }
};

constexpr size_t kPrefetch = 4096;  // bytes ahead of the work, at least

// Four sums of products of 16 or 32 weights with x at a column, both planes. They stay within
// 256 * 8 * 128 * 128 = 2^25.
FALLOW_INLINE float32x4_t dot16(int8x16_t w, const Activation& x, size_t column) {
  const int32x4_t high = dot4(vdupq_n_s32(0), w, vld1q_s8(x.high + column));
  const int32x4_t low = dot4(vdupq_n_s32(0), w, vld1q_s8(x.low + column));
  return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
}
FALLOW_INLINE float32x4_t dot32(int8x16x2_t w, const Activation& x, size_t column) {
  const auto plane = [&](const int8_t* p) {
    const int32x4_t first = dot4(vdupq_n_s32(0), w.val[0], vld1q_s8(p));
    return dot4(first, w.val[1], vld1q_s8(p + 16));
  };
  const int32x4_t high = plane(x.high + column), low = plane(x.low + column);
  return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high, 8), low));
}

void gemv_two_bits(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                   size_t k, const Activation& x, float* y) {
  const OneScale input(x.x, k);
  const size_t quarter = k / 4;
  const uint8x16_t bits = vdupq_n_u8(3);
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* row = w + row_of(rows, begin, i) * row_bytes;
    int32x4_t high = vdupq_n_s32(0), low = high;
    for (size_t p = 0; p < quarter; p += 16) {
      uint8_t last[16] = {};
      if (quarter - p < 16) std::memcpy(last, row + p, quarter - p);
      uint8x16_t codes = vld1q_u8(quarter - p < 16 ? last : row + p);
      for (size_t part = 0; part < 4; ++part) {
        const int8x16_t code = vreinterpretq_s8_u8(vandq_u8(codes, bits));
        const size_t at = part * quarter + p;
        codes = vshrq_n_u8(codes, 2);
        high = dot4(high, code, vld1q_s8(input.high() + at));
        low = dot4(low, code, vld1q_s8(input.low() + at));
      }
    }
    y[i] = input.dot(two_bits_scale(row, k), vaddvq_s32(vaddq_s32(vshlq_n_s32(high, 8), low)));
  }
}

template <class F>
void gemv_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const Activation& x, float* y) {
  constexpr int chunks = F::block / kChunk, groups = F::block / F::group;
  const size_t ahead = kPrefetch / row_bytes + 1;
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* b = w + row_of(rows, begin, i) * row_bytes;
    const uint8_t* later =
        i + ahead < n ? w + row_of(rows, begin, i + ahead) * row_bytes : nullptr;
    float32x4_t acc = vdupq_n_f32(0);
    float minima = 0;
    for (size_t at = 0; at < k; at += F::block, b += F::bytes) {
      prefetch(later, F::bytes);
      float s[groups], m[groups];
      F::groups(b, s, m);
      for (int g = 0; g < groups; ++g) {
        const size_t group = at / F::group + static_cast<size_t>(g);
        if constexpr (F::has_min) minima += m[g] * x.sum[group];
        s[g] *= x.d[group * F::group / 32];
      }
#pragma GCC unroll 8
      for (int j = 0; j < chunks; ++j) {
        const int8x16x2_t q = F::chunk(b, j);
        const size_t column = at + kChunk * static_cast<size_t>(j);
        if constexpr (F::group == 32) {
          acc = vfmaq_n_f32(acc, dot32(q, x, column), s[j]);
        } else {
          acc = vfmaq_n_f32(acc, dot16(q.val[0], x, column), s[2 * j]);
          acc = vfmaq_n_f32(acc, dot16(q.val[1], x, column + 16), s[2 * j + 1]);
        }
      }
    }
    y[i] = vaddvq_f32(acc) - minima;
  }
}

// Four rows' coefficients of each group, as int8 with one scale for the four.
template <int groups>
FALLOW_INLINE void round_coefficients(const float (&c)[4][groups], int8_t (&q)[4][groups],
                                      float (&scale)[groups]) {
  for (int g = 0; g < groups; ++g) {
    float largest = 0;
    for (int r = 0; r < 4; ++r) {
      const float magnitude = __builtin_fabsf(c[r][g]);
      largest = magnitude > largest ? magnitude : largest;
    }
    const float inverse = largest > 0 ? 127 / largest : 0.0f;
    scale[g] = largest / 127;
    for (int r = 0; r < 4; ++r) q[r][g] = static_cast<int8_t>(vcvtns_s32_f32(c[r][g] * inverse));
  }
}

// sums += four rows of one block times their coefficients.
template <class F>
FALLOW_INLINE void axpy_block(const uint8_t* const* b, const float* c, float* sums, float* minima) {
  constexpr int chunks = F::block / kChunk, groups = F::block / F::group;
  float s[4][groups], scale[groups];
  int8_t q[4][groups];  // c * s with one scale for the four rows
  for (int r = 0; r < 4; ++r) {
    float m[groups];
    F::groups(b[r], s[r], m);
    for (int g = 0; g < groups; ++g) {
      if constexpr (F::has_min) minima[g] += c[r] * m[g];
      s[r][g] *= c[r];
    }
  }
  round_coefficients(s, q, scale);
#pragma GCC unroll 2
  for (int j = 0; j < chunks; ++j) {
    const int8x16x2_t w[4] = {F::chunk(b[0], j), F::chunk(b[1], j), F::chunk(b[2], j),
                              F::chunk(b[3], j)};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const int g = F::group == 32 ? j : 2 * j + h;
      const int8_t four[4] = {q[0][g], q[1][g], q[2][g], q[3][g]};
      const int8x16_t size = vreinterpretq_s8_u32(
          vdupq_n_u32(load_u32(reinterpret_cast<const uint8_t*>(four))));
      float* to = sums + kChunk * static_cast<size_t>(j) + 16 * h;
      // Four columns, each with its four rows side by side.
      const auto add = [&](int16x8_t columns, float* y) {
        const int32x4_t sum = dot4(vdupq_n_s32(0), vreinterpretq_s8_s16(columns), size);
        vst1q_f32(y, vfmaq_n_f32(vld1q_f32(y), vcvtq_f32_s32(sum), scale[g]));
      };
      const int8x16x2_t w01 = vzipq_s8(w[0].val[h], w[1].val[h]);
      const int8x16x2_t w23 = vzipq_s8(w[2].val[h], w[3].val[h]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int16x8_t p01 = vreinterpretq_s16_s8(w01.val[half]);
        const int16x8_t p23 = vreinterpretq_s16_s8(w23.val[half]);
        add(vzip1q_s16(p01, p23), to + 8 * half);
        add(vzip2q_s16(p01, p23), to + 8 * half + 4);
      }
    }
  }
}

// Four rows at a time, in slabs of columns.
template <class F>
void axpy_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const float* coefficient, float* y) {
  if (n == 0) return;
  const size_t ahead = kPrefetch / row_bytes + 4;
  for (size_t first = 0; first < k; first += kSlab) {
    const uint8_t* slab = w + first / F::block * F::bytes;
    const size_t width = k - first < kSlab ? k - first : kSlab;
    float sums[kSlab] = {};
    float minima[kSlab / F::group] = {};
    const auto row_at = [&](size_t i) { return slab + row_of(rows, begin, i) * row_bytes; };
    for (size_t i = 0; i < n; i += 4) {
      const uint8_t *b[4], *later[4];
      float c[4];
      for (size_t r = 0; r < 4; ++r) {  // rows past the end are the last one with coefficient 0
        const bool there = i + r < n;
        b[r] = row_at(there ? i + r : n - 1);
        c[r] = there ? coefficient[i + r] : 0.0f;
        later[r] = i + r + ahead < n ? row_at(i + r + ahead) : nullptr;
      }
      for (size_t at = 0; at < width; at += F::block) {
        for (auto& p : later) prefetch(p, F::bytes);
        axpy_block<F>(b, c, sums + at, minima + at / F::group);
        for (auto& p : b) p += F::bytes;
      }
    }
    for (size_t j = 0; j < width; ++j) y[first + j] += sums[j] - minima[j / F::group];
  }
}

// Four weights of a float row as float32; the last ones of a row come one at a time.
struct L32 {
  static constexpr size_t bytes = 4;
  static FALLOW_INLINE float32x4_t load(const uint8_t* p) {
    return vreinterpretq_f32_u8(vld1q_u8(p));
  }
  static FALLOW_INLINE float one(const uint8_t* p) { return std::bit_cast<float>(load_u32(p)); }
};
struct LF16 {
  static constexpr size_t bytes = 2;
  static FALLOW_INLINE float32x4_t load(const uint8_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
  }
  static FALLOW_INLINE float one(const uint8_t* p) { return load_half(p); }
};
struct LBF16 {
  static constexpr size_t bytes = 2;
  static FALLOW_INLINE float32x4_t load(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
  }
  static FALLOW_INLINE float one(const uint8_t* p) { return load_bf16(p); }
};

template <class L>
FALLOW_INLINE float dot_float(const uint8_t* a, const float* x, size_t n) {
  float32x4_t sum[4] = {};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (size_t j = 0; j < 4; ++j)
      sum[j] = vfmaq_f32(sum[j], L::load(a + (i + 4 * j) * L::bytes), vld1q_f32(x + i + 4 * j));
  for (; i + 4 <= n; i += 4)
    sum[0] = vfmaq_f32(sum[0], L::load(a + i * L::bytes), vld1q_f32(x + i));
  float total = vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
  for (; i < n; ++i) total += L::one(a + i * L::bytes) * x[i];
  return total;
}

template <class L>
FALLOW_INLINE void axpy_float(float c, const uint8_t* a, size_t n, float* y) {
  size_t i = 0;
  for (; i + 4 <= n; i += 4)
    vst1q_f32(y + i, vfmaq_n_f32(vld1q_f32(y + i), L::load(a + i * L::bytes), c));
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

float sum_squares(const float* x, size_t n) {
  return dot_float<L32>(reinterpret_cast<const uint8_t*>(x), x, n);
}

// What attention decodes for every token; other types only prefill needs.
void decode(uint32_t type, const uint8_t* row, size_t k, float* y) {
  if (type != kF16) return portable_kernels().decode(type, row, k, y);
  size_t i = 0;
  for (; i + 4 <= k; i += 4) vst1q_f32(y + i, LF16::load(row + i * LF16::bytes));
  for (; i < k; ++i) y[i] = LF16::one(row + i * LF16::bytes);
}

void to_f16(const float* x, size_t n, uint16_t* y) {
  size_t i = 0;
  for (; i + 4 <= n; i += 4)
    vst1_u16(y + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
  for (; i < n; ++i) {
    const __fp16 half = static_cast<__fp16>(x[i]);
    std::memcpy(y + i, &half, sizeof half);
  }
}

// Half a panel at a time, four registers of it, times `tokens` columns of x: 20 sums stay in
// registers, which 24 of three columns and eight registers did not. All indices of them must be
// constants for that, hence the unrolling.
template <int tokens>
FALLOW_INLINE void gemm_tile(const float* panel, size_t n, size_t k, const float* x,
                             size_t x_stride, bool add, float* y, size_t stride) {
  constexpr size_t kHalf = kPanel / 2;
  for (size_t first = 0; first < n; first += kHalf) {
    float32x4_t sum[tokens][4] = {};
    for (size_t j = 0; j < k; ++j) {
      const float* a = panel + j * kPanel + first;
#pragma GCC unroll 5
      for (int t = 0; t < tokens; ++t) {
        const float v = x[static_cast<size_t>(t) * x_stride + j];
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) sum[t][h] = vfmaq_n_f32(sum[t][h], vld1q_f32(a + 4 * h), v);
      }
    }
#pragma GCC unroll 5
    for (int t = 0; t < tokens; ++t) {
      float values[kHalf], *to = y + static_cast<size_t>(t) * stride + first;
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h) vst1q_f32(values + 4 * h, sum[t][h]);
      for (size_t r = 0; r < kHalf && first + r < n; ++r)
        to[r] = add ? to[r] + values[r] : values[r];
    }
  }
}

void gemm_f32(const float* panel, size_t n, size_t k, const float* x, size_t x_stride,
              size_t tokens, bool add, float* y, size_t stride) {
  size_t t = 0;
  for (; t + 5 <= tokens; t += 5)
    gemm_tile<5>(panel, n, k, x + t * x_stride, x_stride, add, y + t * stride, stride);
  for (; t < tokens; ++t)
    gemm_tile<1>(panel, n, k, x + t * x_stride, x_stride, add, y + t * stride, stride);
}

// Four floats; see shared.h.
struct V {
  using F = float32x4_t;
  static constexpr size_t n = 4;
  static FALLOW_INLINE F load(const float* p) { return vld1q_f32(p); }
  static FALLOW_INLINE void store(float* p, F v) { vst1q_f32(p, v); }
  static FALLOW_INLINE F splat(float v) { return vdupq_n_f32(v); }
  static FALLOW_INLINE F min(F a, F b) { return vminq_f32(a, b); }
  static FALLOW_INLINE F max(F a, F b) { return vmaxq_f32(a, b); }
  static FALLOW_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static FALLOW_INLINE F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
  static FALLOW_INLINE F round(F v) { return vrndnq_f32(v); }
  // In two steps, so that results below 2^-126 are right.
  static FALLOW_INLINE F scale(F p, F n) {
    const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    const auto power = [](int32x4_t e) {
      return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23));
    };
    return p * power(half) * power(vsubq_s32(whole, half));
  }
};

float softmax_numerators(float* x, size_t n, float& largest) {
  return softmax_numerators_of<V>(x, n, largest);
}
void silu(float* x, size_t n) { in_place<V>(x, n, silu_of<V>); }
void gelu_tanh(float* x, size_t n) { in_place<V>(x, n, gelu_tanh_of<V>); }

template <class F>
void add(Kernels& table) {
  table.gemv_rows[F::type] = gemv_rows<F>;
  table.axpy_rows[F::type] = axpy_rows<F>;
}

template <class L>
void add_float(Kernels& table, uint32_t type) {
  table.gemv_rows[type] = gemv_rows_float<L>;
  table.axpy_rows[type] = axpy_rows_float<L>;
}

void and_tile(const uint64_t* const* rows, const uint64_t* const* others, size_t words,
              uint32_t* counts) {
  constexpr size_t kStep = 2, kMost = 31 * kStep;  // words of a register, and of 31 of them
  for (size_t r = 0; r < kBitTile; ++r) {
    uint32_t* of_row = counts + r * kBitTile;
    std::fill(of_row, of_row + kBitTile, 0);
    for (size_t begin = 0; begin < words; begin += kMost) {
      uint8x16_t bytes[kBitTile] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
      for (size_t i = begin; i < std::min(begin + kMost, words); i += kStep) {
        const uint64x2_t row = vld1q_u64(rows[r] + i);
        for (size_t c = 0; c < kBitTile; ++c)
          bytes[c] = vaddq_u8(bytes[c], vcntq_u8(vreinterpretq_u8_u64(
                                            vandq_u64(row, vld1q_u64(others[c] + i)))));
      }
      for (size_t c = 0; c < kBitTile; ++c) of_row[c] += vaddlvq_u8(bytes[c]);
    }
  }
}

Kernels make() {
  Kernels table = portable_kernels();  // what is not below stays scalar
#if defined(__ARM_FEATURE_DOTPROD)
  table.name = "neon_dotprod";
#else
  table.name = "neon";
#endif
  add<W4_0>(table);
  add<W4_1>(table);
  add<W5_0>(table);
  add<W5_1>(table);
  add<W8_0>(table);
  add<W4_K>(table);
  add<W5_K>(table);
  add<W6_K>(table);
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

#if defined(__ARM_FEATURE_DOTPROD)
const Kernels* neon_dotprod_kernels() {
#if defined(__linux__)  // Apple's all have it
  if (!(getauxval(AT_HWCAP) & HWCAP_ASIMDDP)) return nullptr;
#endif
#else
const Kernels* neon_kernels() {
#endif
  static const Kernels table = make();
  return &table;
}

}  // namespace fallow

#else

namespace fallow {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace fallow

#endif
